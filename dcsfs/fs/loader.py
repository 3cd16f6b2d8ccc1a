"""Load inodes, names and maps from the satellite, decrypted and checked against their seals."""

from collections.abc import Callable

from dcsfs import keys
from dcsfs.fs.state import Dentry, Inode
from dcsfs.keys import InodeKey, Place, Sealed
from dcsfs.uplink.client import BucketClient
from network import messages as m
from network.errors import IntegrityError, NotFound, Unavailable
from network.extentmap import Row, check_rows, map_root
from network.ids import ExtentID
from network.limits import LIST_PAGE_ENTRIES_MAX, PATH_LEVELS_MAX

MAP_RETRIES = 5


def verify_record(client: BucketClient, record: m.InodeRecord, key: InodeKey) -> None:
    """Raise IntegrityError unless the record is what its seal says."""
    sealed = Sealed(
        record.inode,
        record.generation,
        record.kind,
        record.attributes,
        record.content_version,
        record.size,
        keys.map_root_of(record.seal),
    )
    key.verify_seal(client.bucket_id, sealed, record.seal)


def inode_from(client: BucketClient, record: m.InodeRecord, key: InodeKey, parent: int) -> Inode:
    """Build an inode from a verified record."""
    verify_record(client, record, key)
    a = record.attributes
    symlink = b""
    if record.kind is m.Kind.SYMLINK:
        symlink = key.decrypt_symlink(record.inode, record.symlink)
    return Inode(
        record.inode, record.generation, record.kind, key, record.rdev, record.nlink,
        a.mode, a.uid, a.gid, a.atime_ns, a.mtime_ns, a.ctime_ns,
        len(symlink) if symlink else record.size,
        content_version=record.content_version,
        committed_size=record.size,
        allocated=record.allocated,
        seal=record.seal,
        symlink=symlink,
        parent=parent,
        xattrs=None if record.xattr_count else {},
        xattr_count=record.xattr_count,
        rows=None if record.allocated else [],
    )  # fmt: skip


def root_inode(client: BucketClient) -> Inode:
    """The bucket's root directory."""
    record = client.info.root
    return inode_from(client, record, InodeKey(client.root_key), record.inode)


def open_entry(client: BucketClient, parent: Inode, entry: m.EntryRecord) -> tuple[Dentry, Inode]:
    """Decrypt one entry of a directory: IntegrityError if it was grafted or altered."""
    record = entry.inode
    name = parent.key.decrypt_name(entry.name)
    place = Place(parent.number, record.inode, record.generation, record.kind)
    secret = parent.key.unwrap_child(entry.wrapped_key, client.bucket_id, place, entry.name)
    child = inode_from(client, record, InodeKey(secret), parent.number)
    return Dentry(entry.dentry_id, name, record.inode, record.kind), child


async def lookup(client: BucketClient, parent: Inode, name: bytes) -> tuple[Dentry, Inode] | None:
    """Find a name at the satellite; None if it does not exist."""
    encrypted = parent.key.encrypt_name(name)
    try:
        entry = await client.call(
            m.LOOKUP, m.LookupRequest(client.api_key, client.bucket, parent.number, encrypted)
        )
    except NotFound:
        return None
    dentry, child = open_entry(client, parent, entry)
    if dentry.name != name:
        raise IntegrityError("the satellite answered with another name than asked")
    return dentry, child


async def list_page(
    client: BucketClient, parent: Inode, after: int, limit: int
) -> tuple[list[tuple[Dentry, Inode]], bool]:
    """Up to `limit` entries after a dentry id, in id order, and whether there are more."""
    limit = min(limit, LIST_PAGE_ENTRIES_MAX)
    page = await client.call(
        m.LIST_DIRECTORY,
        m.ListRequest(client.api_key, client.bucket, parent.number, after, limit),
    )
    for entry in page.entries:
        if entry.dentry_id <= after:
            raise IntegrityError("the satellite lists a directory in circles")
        after = entry.dentry_id
    found = [open_entry(client, parent, entry) for entry in page.entries]
    return found, page.more and bool(found)


async def find_path(
    client: BucketClient, number: int, known: Callable[[int], Inode | None]
) -> list[Inode]:
    """Load an inode by its number, with the directories above it up to one that is known.

    Returns them from the highest to the one asked for. Raises NotFound if it has no name.
    """
    steps: list[m.PathStep] = []
    at = number
    while known(at) is None:
        request = m.InodeRequest(client.api_key, client.bucket, at)
        page = (await client.call(m.FIND_PATH, request)).steps
        if not page:
            raise NotFound(f"inode {number} has no name")
        for step in page:
            if step.entry.inode.inode != at:
                raise IntegrityError("the satellite answered with another inode than asked")
            steps.append(step)
            at = step.parent
            if known(at) is not None:
                break
        if len(steps) > PATH_LEVELS_MAX:
            raise IntegrityError(f"the path of inode {number} leads in circles")
    found: list[Inode] = []
    parent = known(at)
    for step in reversed(steps):
        assert parent is not None
        _, parent = open_entry(client, parent, step.entry)
        found.append(parent)
    return found


async def load_map(
    client: BucketClient, inode: Inode
) -> tuple[m.InodeRecord, list[Row], dict[ExtentID, m.Placement]]:
    """A file's record and committed map as of one moment, checked against its seal.

    Raises IntegrityError for anything altered, and for a record older than the one known.
    """
    for _ in range(MAP_RETRIES):
        found = await _load_map_once(client, inode)
        if found is not None:
            return found
    raise Unavailable("the file changes faster than its extent map can be read")


async def _load_map_once(
    client: BucketClient, inode: Inode
) -> tuple[m.InodeRecord, list[Row], dict[ExtentID, m.Placement]] | None:
    """None when another writer committed between two pages."""
    record: m.InodeRecord | None = None
    rows: list[Row] = []
    placements: dict[ExtentID, m.Placement] = {}
    after = 0
    while True:
        page = await client.call(
            m.GET_MAP, m.MapRequest(client.api_key, client.bucket, inode.number, after)
        )
        if record is not None and page.inode.content_version != record.content_version:
            return None
        record = page.inode
        rows += page.rows
        placements |= {item.extent_id: item for item in page.placements}
        if not page.more or not page.rows:
            break
        after = page.rows[-1].end
    if record.inode != inode.number or record.content_version < inode.content_version:
        raise IntegrityError(f"inode {inode.number} was rolled back at the satellite")
    verify_record(client, record, inode.key)
    check_rows(rows)
    if map_root(rows) != keys.map_root_of(record.seal):
        raise IntegrityError(
            f"the extent map of inode {inode.number} is not the one its owner sealed: "
            "it was altered at the satellite"
        )
    for row in rows:
        placement = placements.get(row.extent_id)
        if placement is None:
            raise IntegrityError(f"extent {row.extent_id} has no placement")
        if row.extent_offset + row.length > keys.plaintext_bytes(placement.ciphertext_bytes):
            raise IntegrityError(f"a map row passes the end of extent {row.extent_id}")
    return record, rows, placements


async def load_xattrs(client: BucketClient, inode: Inode) -> dict[bytes, bytes]:
    """All extended attributes, decrypted."""
    reply = await client.call(
        m.GET_XATTRS, m.InodeRequest(client.api_key, client.bucket, inode.number)
    )
    return {
        inode.key.decrypt_xattr_name(item.name): inode.key.decrypt_xattr_value(
            inode.number, item.name, item.value
        )
        for item in reply.xattrs
    }

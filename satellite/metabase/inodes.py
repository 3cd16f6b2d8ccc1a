"""Inodes: read, make, set attributes, reap."""

from network.errors import AlreadyExists, InvalidArgument, NotFound, PreconditionFailed
from network.messages import (
    Attributes,
    InodeRecord,
    Kind,
    NewInode,
    SetAttributes,
    SetXattr,
    Touch,
)
from satellite.db.database import DbRow, Transaction
from satellite.metabase import extents

_COLUMNS = (
    "inode, generation, kind, rdev, nlink, size, allocated, content_version, mode, uid, gid,"
    " atime_ns, mtime_ns, ctime_ns, symlink, seal"
)
RECORD_COLUMNS = _COLUMNS + (
    ", (SELECT count(*) FROM xattr WHERE xattr.bucket_id=inode.bucket_id"
    " AND xattr.inode=inode.inode)"
)


def record_from(row: DbRow) -> InodeRecord:
    """Build the record from RECORD_COLUMNS."""
    (inode, generation, kind, rdev, nlink, size, allocated, version, mode, uid, gid,
     atime, mtime, ctime, symlink, seal, xattrs) = row  # fmt: skip
    return InodeRecord(
        int(inode), int(generation), Kind(int(kind)), int(rdev), int(nlink), int(size),
        int(allocated), int(version),
        Attributes(int(mode), int(uid), int(gid), int(atime), int(mtime), int(ctime)),
        _blob(symlink), _blob(seal), int(xattrs),
    )  # fmt: skip


def _blob(value: int | str | bytes) -> bytes:
    assert isinstance(value, bytes)
    return value


def get(tx: Transaction, bucket_id: int, inode: int) -> InodeRecord:
    """Read an inode; raises NotFound."""
    row = tx.one(
        f"SELECT {RECORD_COLUMNS} FROM inode WHERE bucket_id=? AND inode=?", (bucket_id, inode)
    )
    if row is None:
        raise NotFound(f"inode {inode} does not exist")
    return record_from(row)


def kind_of(tx: Transaction, bucket_id: int, inode: int) -> Kind:
    """The kind alone; raises NotFound, also for an inode without dentries."""
    row = tx.one("SELECT kind, nlink FROM inode WHERE bucket_id=? AND inode=?", (bucket_id, inode))
    if row is None or row[1] == 0:
        raise NotFound(f"inode {inode} does not exist")
    return Kind(int(row[0]))


def insert(tx: Transaction, bucket_id: int, new: NewInode, nlink: int) -> None:
    """Make an inode; raises AlreadyExists for a number in use, InvalidArgument."""
    if not 0 <= new.attributes.mode <= 0o7777:
        raise InvalidArgument("mode is out of range")
    exists = tx.one("SELECT 1 FROM inode WHERE bucket_id=? AND inode=?", (bucket_id, new.inode))
    if exists:
        raise AlreadyExists(f"inode {new.inode} is in use")
    a = new.attributes
    tx.execute(
        f"INSERT INTO inode (bucket_id, {_COLUMNS}) VALUES (?,?,?,?,?,?,0,0,0,?,?,?,?,?,?,?,?)",
        (
            bucket_id, new.inode, new.generation, int(new.kind), new.rdev, nlink,
            a.mode, a.uid, a.gid, a.atime_ns, a.mtime_ns, a.ctime_ns, new.symlink, new.seal,
        ),
    )  # fmt: skip


def add_links(tx: Transaction, bucket_id: int, inode: int, count: int) -> None:
    """Change nlink by `count`."""
    tx.execute(
        "UPDATE inode SET nlink=nlink+? WHERE bucket_id=? AND inode=?", (count, bucket_id, inode)
    )


def set_attributes(
    tx: Transaction, bucket_id: int, inode: int, attributes: Attributes, seal: bytes
) -> None:
    """Set the clear attributes and the seal; raises NotFound, InvalidArgument."""
    a = attributes
    if not 0 <= a.mode <= 0o7777:
        raise InvalidArgument("mode is out of range")
    changed = tx.execute(
        "UPDATE inode SET mode=?, uid=?, gid=?, atime_ns=?, mtime_ns=?, ctime_ns=?, seal=?"
        " WHERE bucket_id=? AND inode=?",
        (a.mode, a.uid, a.gid, a.atime_ns, a.mtime_ns, a.ctime_ns, seal, bucket_id, inode),
    )
    if not changed:
        raise NotFound(f"inode {inode} does not exist")


def check_seal(tx: Transaction, bucket_id: int, inode: int, expected: bytes) -> None:
    """Raise PreconditionFailed if the seal is another one; an empty one expects nothing."""
    if not expected:
        return
    row = tx.one("SELECT seal FROM inode WHERE bucket_id=? AND inode=?", (bucket_id, inode))
    if row is not None and row[0] != expected:
        raise PreconditionFailed(f"inode {inode} has been changed by another session")


def apply_touch(tx: Transaction, bucket_id: int, op: Touch) -> None:
    """Touch; what is gone needs no times."""
    tx.execute(
        "UPDATE inode SET mtime_ns=coalesce(?, mtime_ns), ctime_ns=? WHERE bucket_id=? AND inode=?",
        (op.mtime_ns, op.ctime_ns, bucket_id, op.inode),
    )


def apply_set_attributes(tx: Transaction, bucket_id: int, op: SetAttributes) -> None:
    """SetAttributes."""
    check_seal(tx, bucket_id, op.inode, op.expected_seal)
    set_attributes(tx, bucket_id, op.inode, op.attributes, op.seal)


def apply_set_xattr(tx: Transaction, bucket_id: int, op: SetXattr) -> None:
    """SetXattr; removing what is not there succeeds, so that replays do."""
    get(tx, bucket_id, op.inode)
    key = (bucket_id, op.inode, op.name)
    removed = tx.execute("DELETE FROM xattr WHERE bucket_id=? AND inode=? AND name=?", key)
    if op.was_there is not None and op.was_there != bool(removed):
        raise PreconditionFailed("another session has set or removed the attribute")
    if op.value is not None:
        tx.execute("INSERT INTO xattr VALUES (?,?,?,?)", (*key, op.value))


def reap(tx: Transaction, bucket_id: int, inode: int) -> None:
    """Drop an inode that has no dentries, with its map and attributes; gone already is fine."""
    row = tx.one("SELECT nlink FROM inode WHERE bucket_id=? AND inode=?", (bucket_id, inode))
    if row is None:
        return
    if row[0] != 0:
        raise InvalidArgument(f"inode {inode} still has names")
    extents.drop_map(tx, bucket_id, inode)
    key = (bucket_id, inode)
    tx.execute("DELETE FROM xattr WHERE bucket_id=? AND inode=?", key)
    tx.execute("DELETE FROM inode WHERE bucket_id=? AND inode=?", key)


def reap_all(tx: Transaction, bucket_id: int, kept: frozenset[int] = frozenset()) -> None:
    """Drop every inode without dentries but those `kept`: nobody else holds handles any more."""
    rows = tx.all("SELECT inode FROM inode WHERE bucket_id=? AND nlink=0", (bucket_id,))
    for row in rows:
        if row[0] not in kept:
            reap(tx, bucket_id, int(row[0]))

"""Projects, API keys and buckets."""

import re
from dataclasses import dataclass

from network.errors import (
    AlreadyExists,
    InvalidArgument,
    NotEmpty,
    NotFound,
    Unauthenticated,
)
from network.limits import FILE_BYTES_MAX
from network.messages import BucketInfo, CreateBucketRequest, Kind, SchemeWire
from satellite.db.database import DbRow, Transaction
from satellite.metabase import inodes

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9.-]{1,61})[a-z0-9]")


@dataclass(frozen=True, slots=True)
class KeyRow:
    """What an API key's head stands for."""

    project_id: int
    secret: bytes


def find_key(tx: Transaction, head: bytes) -> KeyRow:
    """The key with this head; raises Unauthenticated."""
    row = tx.one("SELECT project_id, secret, revoked FROM api_key WHERE head=?", (head,))
    if row is None or row[2]:
        raise Unauthenticated("API key is unknown or revoked")
    assert isinstance(row[1], bytes)
    return KeyRow(int(row[0]), row[1])


def create_project(tx: Transaction, name: str, salt: bytes, now_ns: int) -> int:
    """Make a project; returns its id."""
    project_id = tx.number("SELECT coalesce(max(project_id), 0) + 1 FROM project")
    tx.execute("INSERT INTO project VALUES (?,?,?,0,?)", (project_id, name, salt, now_ns))
    return project_id


def create_key(
    tx: Transaction, project_id: int, head: bytes, secret: bytes, name: str, now_ns: int
) -> None:
    """Register an API key's root secret."""
    tx.execute("INSERT INTO api_key VALUES (?,?,?,?,?,0)", (head, project_id, secret, name, now_ns))


def project_salt(tx: Transaction, project_id: int) -> tuple[bytes, str]:
    """(passphrase salt, name) of a project."""
    row = tx.one("SELECT salt, name FROM project WHERE project_id=?", (project_id,))
    assert row is not None
    assert isinstance(row[0], bytes)
    return row[0], str(row[1])


def check_name(name: str) -> None:
    """Raise InvalidArgument unless the name fits S3's rules for bucket names."""
    if not _NAME.fullmatch(name) or ".." in name or re.fullmatch(r"[\d.]+", name):
        raise InvalidArgument(
            f"{name!r} is not a bucket name: 3 to 63 lower-case letters, digits, dots, hyphens"
        )


def create(
    tx: Transaction,
    project_id: int,
    request: CreateBucketRequest,
    now_ns: int,
    scheme: SchemeWire,
) -> BucketInfo:
    """Make a bucket with its root directory; raises AlreadyExists, InvalidArgument."""
    check_name(request.name)
    if request.root.kind is not Kind.DIRECTORY or len(request.bucket_id) != 16:
        raise InvalidArgument("a bucket starts with a directory and a 16-byte id")
    taken = tx.one(
        "SELECT 1 FROM bucket WHERE (project_id=? AND name=?) OR public_id=?",
        (project_id, request.name, request.bucket_id),
    )
    if taken:
        raise AlreadyExists(f"bucket {request.name!r} exists")
    bucket_id = tx.number("SELECT coalesce(max(bucket_id), 0) + 1 FROM bucket")
    tx.execute(
        "INSERT INTO bucket (bucket_id, public_id, project_id, name, wrapped_root_key, root_inode,"
        " next_number, transactions, created_ns) VALUES (?,?,?,?,?,?,?,0,?)",
        (
            bucket_id, request.bucket_id, project_id, request.name, request.wrapped_root_key,
            request.root.inode, request.root.inode + 1, now_ns,
        ),
    )  # fmt: skip
    inodes.insert(tx, bucket_id, request.root, 2)
    return get(tx, project_id, request.name, scheme)


_COLUMNS = (
    "bucket_id, public_id, name, wrapped_root_key, root_inode, created_ns, quota_bytes, used_bytes"
)


def _info(tx: Transaction, row: DbRow, scheme: SchemeWire) -> BucketInfo:
    bucket_id, public_id, name, wrapped, root, created_ns, quota, used = row
    assert isinstance(public_id, bytes)
    assert isinstance(wrapped, bytes)
    live = tx.number("SELECT sum(live_bytes) FROM segment WHERE bucket_id=?", (bucket_id,))
    record = inodes.get(tx, int(bucket_id), int(root))
    return BucketInfo(
        str(name), public_id, wrapped, record, int(created_ns), live, scheme, int(quota), int(used)
    )


def get(tx: Transaction, project_id: int, name: str, scheme: SchemeWire) -> BucketInfo:
    """A bucket by name; raises NotFound."""
    row = tx.one(f"SELECT {_COLUMNS} FROM bucket WHERE project_id=? AND name=?", (project_id, name))
    if row is None:
        raise NotFound(f"bucket {name!r} does not exist")
    return _info(tx, row, scheme)


def get_id(tx: Transaction, project_id: int, name: str) -> int:
    """A bucket's internal id; raises NotFound."""
    row = tx.one("SELECT bucket_id FROM bucket WHERE project_id=? AND name=?", (project_id, name))
    if row is None:
        raise NotFound(f"bucket {name!r} does not exist")
    return int(row[0])


def set_quota(tx: Transaction, project: str, name: str, quota_bytes: int) -> int:
    """Set how many bytes of content a bucket may hold, 0 for any number; returns what it holds.

    Raises NotFound, InvalidArgument. A quota under what is there refuses everything more.
    """
    if not 0 <= quota_bytes <= FILE_BYTES_MAX:
        raise InvalidArgument("a quota is a number of bytes")
    row = tx.one(
        "SELECT bucket_id, used_bytes FROM bucket JOIN project USING (project_id)"
        " WHERE project.name=? AND bucket.name=?",
        (project, name),
    )
    if row is None:
        raise NotFound(f"project {project!r} has no bucket {name!r}")
    tx.execute("UPDATE bucket SET quota_bytes=? WHERE bucket_id=?", (quota_bytes, int(row[0])))
    return int(row[1])


def list_all(tx: Transaction, project_id: int, scheme: SchemeWire) -> list[BucketInfo]:
    """All buckets of a project by name."""
    rows = tx.all(
        f"SELECT {_COLUMNS} FROM bucket WHERE project_id=? ORDER BY name LIMIT 4096",
        (project_id,),
    )
    return [_info(tx, row, scheme) for row in rows]


def delete(tx: Transaction, project_id: int, name: str, now_s: int) -> None:
    """Remove an empty bucket without an active session; raises NotEmpty, NotFound."""
    bucket_id = get_id(tx, project_id, name)
    if tx.one("SELECT 1 FROM dentry WHERE bucket_id=? LIMIT 1", (bucket_id,)):
        raise NotEmpty(f"bucket {name!r} is not empty")
    active = tx.one(
        "SELECT host, pid FROM session WHERE bucket_id=? AND expires_s>?", (bucket_id, now_s)
    )
    if active:
        raise NotEmpty(
            f"bucket {name!r} is mounted on host {active[0]!s}, process {int(active[1])}"
        )
    inodes.reap_all(tx, bucket_id)
    tx.execute("DELETE FROM inode WHERE bucket_id=?", (bucket_id,))
    tx.execute("DELETE FROM reservation WHERE bucket_id=?", (bucket_id,))
    tx.execute("DELETE FROM session WHERE bucket_id=?", (bucket_id,))
    tx.execute("DELETE FROM bucket WHERE bucket_id=?", (bucket_id,))

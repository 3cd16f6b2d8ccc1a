"""What goes into the write-back log, and how it is read back (docs/specs/log.md).

An OPERATION record holds the satellite operation and the local state it leads to, so replay sets
states and needs no rule per operation. DATA holds file bytes. A FLUSH record says, before a batch
is sent, which records it covers; DONE says that the satellite has it. NAMES_FLUSH is a FLUSH that
covers OPERATION records alone: their file bytes follow later.
"""

import struct
from dataclasses import dataclass
from typing import Annotated

from dcsfs.cache.log import Position, WriteLog
from dcsfs.fs.state import Inode
from network.codec import Max, pack
from network.ids import Hash, SessionID
from network.limits import NAME_BYTES_MAX, SYMLINK_BYTES_MAX, XATTR_VALUE_BYTES_MAX
from network.messages import Attributes, Kind, Operation

OPERATION = 1
DATA = 2
TRUNCATE = 3
FLUSH = 4
DONE = 5
NAMES_FLUSH = 6

DATA_HEAD = struct.Struct(">QQq")


@dataclass(frozen=True, slots=True)
class InodeState:
    """An inode after an operation, with its key: the log is encrypted."""

    number: int
    generation: int
    kind: Kind
    key: Annotated[bytes, Max(32)]
    rdev: int
    nlink: int
    attributes: Attributes
    size: int
    content_version: int
    committed_size: int
    allocated: int
    seal: Annotated[bytes, Max(128)]
    symlink: Annotated[bytes, Max(SYMLINK_BYTES_MAX)]
    parent: int
    xattr_count: int


@dataclass(frozen=True, slots=True)
class DentryState:
    """A name after an operation; `child` 0 means removed."""

    parent: int
    name: Annotated[bytes, Max(NAME_BYTES_MAX)]
    dentry_id: int
    child: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class XattrState:
    """An extended attribute after an operation."""

    inode: int
    name: Annotated[bytes, Max(1024)]
    value: Annotated[bytes, Max(XATTR_VALUE_BYTES_MAX)] | None


@dataclass(frozen=True, slots=True)
class OperationRecord:
    """One namespace change. `operation` is None when only an inode's attributes changed."""

    operation: Operation | None
    inodes: tuple[InodeState, ...]
    dentries: tuple[DentryState, ...]
    xattrs: tuple[XattrState, ...]


@dataclass(frozen=True, slots=True)
class TruncateRecord:
    """A file was cut or grown to `size`."""

    inode: int
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class FlushRecord:
    """Batch `sequence` with hash chain `chain` covers all records up to `covered`."""

    session_id: SessionID
    sequence: int
    chain: Hash
    covered: int


@dataclass(frozen=True, slots=True)
class DoneRecord:
    """Batch `sequence` is committed at the satellite."""

    session_id: SessionID
    sequence: int


def state_of(inode: Inode) -> InodeState:
    """Snapshot an inode for the log."""
    return InodeState(
        inode.number, inode.generation, inode.kind, inode.key.secret, inode.rdev, inode.nlink,
        inode.attributes, inode.size, inode.content_version, inode.committed_size,
        inode.allocated, inode.seal, inode.symlink, inode.parent, inode.xattr_count,
    )  # fmt: skip


def append_data(
    log: WriteLog, inode: int, offset: int, mtime_ns: int, data: memoryview
) -> Position:
    """Stage file bytes; the payload is 24 bytes of head, then the data."""
    return log.append(DATA, DATA_HEAD.pack(inode, offset, mtime_ns), data)


def append_message(log: WriteLog, kind: int, record: object) -> Position:
    """Append a packed record."""
    return log.append(kind, pack(record))

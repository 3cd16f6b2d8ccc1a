"""Build what the satellite is asked to do: new inodes, wrapped keys, seals. No I/O, no changes."""

import errno
from dataclasses import dataclass

from dcsfs import keys
from dcsfs.fs.errors import FsError
from dcsfs.fs.state import Dentry, Inode
from dcsfs.fs.volume import Volume
from dcsfs.keys import InodeKey, Place, Sealed
from network import messages as m
from network.extentmap import EMPTY_MAP_ROOT
from network.limits import FILE_BYTES_MAX, SYMLINK_BYTES_MAX, TIME_NS_MAX, TIME_NS_MIN
from network.messages import Kind

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request."""

    uid: int
    gid: int
    umask: int


@dataclass(frozen=True, slots=True)
class Changes:
    """What setattr should set; None leaves a field as it is."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    ctime_ns: int | None = None


@dataclass(frozen=True, slots=True)
class NewChild:
    """An inode that is about to get its first name."""

    inode: Inode
    dentry: Dentry
    operation: m.Create


def new_child(
    volume: Volume,
    parent: Inode,
    name: bytes,
    kind: Kind,
    mode: int,
    caller: Caller,
    *,
    rdev: int = 0,
    target: bytes = b"",
) -> NewChild:
    """An inode with fresh numbers and key; group and bits as a set-group-ID parent says.

    ENOENT, ENAMETOOLONG for a symbolic link's target.
    """
    if kind is Kind.SYMLINK and not target:
        raise FsError(errno.ENOENT)
    if len(target) >= SYMLINK_BYTES_MAX:
        raise FsError(errno.ENAMETOOLONG)
    now = volume.runtime.now_ns()
    gid = caller.gid
    if parent.mode & 0o2000:
        gid = parent.gid
        if kind is Kind.DIRECTORY:
            mode |= 0o2000
    number, dentry_id = volume.new_number(), volume.new_number()
    key = InodeKey(volume.runtime.random_bytes(keys.KEY_BYTES))
    inode = Inode(
        number, 1, kind, key, rdev, 2 if kind is Kind.DIRECTORY else 1, mode & 0o7777,
        caller.uid, gid, now, now, now, len(target),
        symlink=target, parent=parent.number, xattrs={}, rows=[],
        is_complete=True,
    )  # fmt: skip
    sealed = Sealed(number, 1, kind, inode.attributes, 0, 0, EMPTY_MAP_ROOT)
    new_inode = m.NewInode(
        number, 1, kind, rdev, inode.attributes,
        key.encrypt_symlink(number, target) if target else b"",
        key.seal(volume.client.bucket_id, sealed),
    )  # fmt: skip
    encrypted, wrapped = wrap(volume, parent, name, inode)
    operation = m.Create(parent.number, encrypted, dentry_id, wrapped, new_inode)
    return NewChild(inode, Dentry(dentry_id, name, number, kind), operation)


def wrap(volume: Volume, parent: Inode, name: bytes, child: Inode) -> tuple[bytes, bytes]:
    """(encrypted name, the child's key wrapped for that dentry)."""
    encrypted = parent.key.encrypt_name(name)
    place = Place(parent.number, child.number, child.generation, child.kind)
    bucket_id = volume.client.bucket_id
    return encrypted, parent.key.wrap_child(child.key.secret, bucket_id, place, encrypted)


def set_attributes(volume: Volume, inode: Inode, attributes: m.Attributes) -> m.SetAttributes:
    """Attributes with the seal over them and the committed content, on top of the known seal."""
    root = keys.map_root_of(inode.seal) if inode.seal else EMPTY_MAP_ROOT
    sealed = Sealed(
        inode.number, inode.generation, inode.kind, attributes,
        inode.content_version, inode.committed_size, root,
    )  # fmt: skip
    seal = inode.key.seal(volume.client.bucket_id, sealed)
    return m.SetAttributes(inode.number, attributes, seal, inode.seal)


def set_xattr(
    inode: Inode, name: bytes, value: bytes | None, *, was_there: bool | None = None
) -> m.SetXattr:
    """Set an extended attribute, or remove it; `was_there` is the satellite's precondition."""
    encrypted = inode.key.encrypt_xattr_name(name)
    if value is None:
        return m.SetXattr(inode.number, encrypted, None, was_there)
    sealed = inode.key.encrypt_xattr_value(inode.number, encrypted, value)
    return m.SetXattr(inode.number, encrypted, sealed, was_there)


def changed_attributes(inode: Inode, changes: Changes, now: int) -> m.Attributes:
    """The attributes after setattr, by POSIX's rules: what clears set-ID bits, which times move.

    A time that cannot be stored becomes the nearest one that can, as in other file systems.
    """
    mode = inode.mode
    if changes.size is not None:
        mode = without_set_id(mode)
    owner_changed = changes.uid is not None or changes.gid is not None
    if changes.mode is not None:
        mode = changes.mode & 0o7777
    elif owner_changed and inode.kind is Kind.FILE:
        mode = without_set_id(mode)
    mtime = inode.mtime_ns if changes.size is None else now
    return m.Attributes(
        mode,
        inode.uid if changes.uid is None else changes.uid,
        inode.gid if changes.gid is None else changes.gid,
        inode.atime_ns if changes.atime_ns is None else _storable(changes.atime_ns),
        mtime if changes.mtime_ns is None else _storable(changes.mtime_ns),
        now if changes.ctime_ns is None else _storable(changes.ctime_ns),
    )


def _storable(time_ns: int) -> int:
    return min(max(time_ns, TIME_NS_MIN), TIME_NS_MAX)


def without_set_id(mode: int) -> int:
    """What writing does to the mode: set-group-ID stays where it is a locking mark."""
    return mode & (~0o6000 if mode & 0o010 else ~0o4000)


def put_attributes(inode: Inode, attributes: m.Attributes) -> None:
    """Set the attributes in memory."""
    inode.mode, inode.uid, inode.gid = attributes.mode, attributes.uid, attributes.gid
    inode.atime_ns, inode.mtime_ns = attributes.atime_ns, attributes.mtime_ns
    inode.ctime_ns = attributes.ctime_ns


def adopt_attributes(inode: Inode, operation: m.SetAttributes) -> None:
    """The satellite has these attributes, and this seal, now."""
    put_attributes(inode, operation.attributes)
    inode.seal = operation.seal


def check_size(inode: Inode, size: int) -> None:
    """Whether a file may get this size: EISDIR, EINVAL, EFBIG."""
    if inode.is_directory:
        raise FsError(errno.EISDIR)
    if inode.kind is not Kind.FILE or size < 0:
        raise FsError(errno.EINVAL)
    if size > FILE_BYTES_MAX:
        raise FsError(errno.EFBIG)

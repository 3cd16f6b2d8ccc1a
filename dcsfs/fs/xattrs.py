"""Extended attributes: loaded once per inode, changed in memory and log together."""

import errno
from collections.abc import Awaitable, Callable

from dcsfs.fs import acl, journal, loader
from dcsfs.fs.errors import FsError
from dcsfs.fs.state import Inode
from dcsfs.fs.volume import Volume
from network import messages as m
from network.limits import NAME_BYTES_MAX, XATTR_VALUE_BYTES_MAX, XATTRS_PER_INODE_MAX

XATTR_CREATE = 1
XATTR_REPLACE = 2


class Xattrs:
    """The attribute operations of one volume."""

    def __init__(self, volume: Volume, prepare_change: Callable[[int], Awaitable[None]]) -> None:
        self._volume = volume
        self._prepare_change = prepare_change

    async def _load(self, number: int) -> tuple[Inode, dict[bytes, bytes]]:
        inode = self._volume.get(number)
        if inode.xattrs is None:
            loaded = await loader.load_xattrs(self._volume.client, inode)
            if inode.xattrs is None:
                inode.xattrs = loaded
        return inode, inode.xattrs

    async def get(self, number: int, name: bytes) -> bytes:
        """An attribute's value; ENODATA."""
        inode = self._volume.get(number)
        _check_namespace(name)
        if inode.xattrs is not None and not inode.xattrs:
            raise FsError(errno.ENODATA)  # asked before every write: no await on this path
        _, xattrs = await self._load(number)
        if name not in xattrs:
            raise FsError(errno.ENODATA)
        return xattrs[name]

    async def names(self, number: int) -> list[bytes]:
        """All names."""
        _, xattrs = await self._load(number)
        return list(xattrs)

    async def set(self, number: int, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an attribute; EEXIST and ENODATA by XATTR_CREATE and XATTR_REPLACE."""
        if not 1 <= len(name) <= NAME_BYTES_MAX:
            raise FsError(errno.ERANGE)
        _check_namespace(name)
        if len(value) > XATTR_VALUE_BYTES_MAX:
            raise FsError(errno.E2BIG)
        inode, xattrs = await self._load(number)
        await self._prepare_change(len(value) + 4096)
        if flags & XATTR_CREATE and name in xattrs:
            raise FsError(errno.EEXIST)
        if flags & XATTR_REPLACE and name not in xattrs:
            raise FsError(errno.ENODATA)
        self._put(inode, xattrs, name, value)

    def _put(self, inode: Inode, xattrs: dict[bytes, bytes], name: bytes, value: bytes) -> None:
        if name not in xattrs and len(xattrs) >= XATTRS_PER_INODE_MAX:
            raise FsError(errno.ENOSPC)
        encrypted = inode.key.encrypt_xattr_name(name)
        sealed = inode.key.encrypt_xattr_value(inode.number, encrypted, value)
        xattrs[name] = value
        self._record(inode, name, value, m.SetXattr(inode.number, encrypted, sealed))

    async def set_acl(
        self, number: int, name: bytes, value: bytes, *, clears_setgid: bool = False
    ) -> None:
        """Set an access list, and the mode with it, or a directory's default list.

        EINVAL for a malformed one, EACCES for a default list on anything but a directory.
        """
        entries = acl.parse(value)
        inode, xattrs = await self._load(number)
        await self._prepare_change(len(value) + 4096)
        if name == acl.DEFAULT and not inode.is_directory:
            raise FsError(errno.EACCES)
        if name == acl.ACCESS and entries:
            inode.mode = inode.mode & 0o7000 | acl.mode_of(entries)
            if clears_setgid:
                inode.mode &= ~0o2000
        if not entries or (name == acl.ACCESS and acl.is_minimal(entries)):
            self._drop(inode, xattrs, name)
        else:
            self._put(inode, xattrs, name, value)

    async def acl_of(self, number: int, name: bytes) -> acl.Acl:
        """A stored list, empty if there is none; from memory where there are no attributes."""
        inode = self._volume.get(number)
        if inode.xattrs is not None and not inode.xattrs:
            return ()
        _, xattrs = await self._load(number)
        return acl.parse(xattrs[name]) if name in xattrs else ()

    def keep_acl(self, inode: Inode, name: bytes, entries: acl.Acl) -> None:
        """Store a list whose mode the inode has already. No checkpoint; room is the caller's."""
        assert inode.xattrs is not None
        self._put(inode, inode.xattrs, name, acl.encode(entries))

    async def remove(self, number: int, name: bytes) -> None:
        """Remove an attribute; ENODATA."""
        inode, xattrs = await self._load(number)
        await self._prepare_change(4096)
        if name not in xattrs and name not in (acl.ACCESS, acl.DEFAULT):
            raise FsError(errno.ENODATA)
        self._drop(inode, xattrs, name)

    def _drop(self, inode: Inode, xattrs: dict[bytes, bytes], name: bytes) -> None:
        """Remove an attribute if it is there; what else has changed is recorded either way."""
        if xattrs.pop(name, None) is None:
            inode.ctime_ns = self._volume.runtime.now_ns()
            self._volume.record(None, touched=(inode,))
            return
        encrypted = inode.key.encrypt_xattr_name(name)
        self._record(inode, name, None, m.SetXattr(inode.number, encrypted, None))

    def _record(
        self, inode: Inode, name: bytes, value: bytes | None, operation: m.SetXattr
    ) -> None:
        inode.ctime_ns = self._volume.runtime.now_ns()
        state = journal.XattrState(inode.number, name, value)
        self._volume.record(operation, xattrs=(state,), touched=(inode,))


def _check_namespace(name: bytes) -> None:
    if name.startswith(b"system.") and name not in (acl.ACCESS, acl.DEFAULT):
        raise FsError(errno.EOPNOTSUPP)

"""Extended attributes: loaded once per inode, changed in memory and log together."""

import errno
from collections.abc import Awaitable, Callable
from dataclasses import replace

from dcsfs.fs import acl, building, journal, loader
from dcsfs.fs.building import set_xattr
from dcsfs.fs.direct import DirectCalls, Watch, decide_attributes, retried
from dcsfs.fs.directories import Directories
from dcsfs.fs.errors import FsError
from dcsfs.fs.lease import by_lease
from dcsfs.fs.state import Inode
from dcsfs.fs.volume import Volume
from network import messages as m
from network.limits import NAME_BYTES_MAX, XATTR_VALUE_BYTES_MAX, XATTRS_PER_INODE_MAX

XATTR_CREATE = 1
XATTR_REPLACE = 2
_NAMESPACES = (b"user", b"trusted", b"security")
"""xattr(7); of `system` there are the access control lists alone."""


class Xattrs:
    """The attribute operations of one volume."""

    def __init__(
        self,
        volume: Volume,
        directories: Directories,
        direct: DirectCalls | None,
        check_writable: Callable[[], None],
        prepare_change: Callable[[int], Awaitable[None]],
    ) -> None:
        self.volume = volume
        self.check_writable = check_writable
        self._directories = directories
        self._prepare_change = prepare_change
        self.shared = SharedXattrs(self, direct) if direct is not None else None
        """Stands in for the methods that are `by_lease`."""

    async def load(self, number: int) -> tuple[Inode, dict[bytes, bytes]]:
        """An inode with its attributes."""
        inode = await self._directories.fresh(number)
        if inode.xattrs is None:
            loaded = await loader.load_xattrs(self.volume.client, inode)
            if inode.xattrs is None:
                inode.xattrs = loaded
        return inode, inode.xattrs

    async def get(self, number: int, name: bytes) -> bytes:
        """An attribute's value; ENODATA."""
        inode = self.volume.get(number)
        _check_namespace(name)
        if inode.is_stale:
            inode = await self._directories.fresh(number)
        if inode.xattrs is not None and not inode.xattrs:
            raise FsError(errno.ENODATA)  # asked before every write: no await on this path
        _, xattrs = await self.load(number)
        if name not in xattrs:
            raise FsError(errno.ENODATA)
        return xattrs[name]

    async def names(self, number: int) -> list[bytes]:
        """All names."""
        _, xattrs = await self.load(number)
        return list(xattrs)

    @by_lease
    async def set(self, number: int, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an attribute; EEXIST and ENODATA by XATTR_CREATE and XATTR_REPLACE."""
        check_new(name, value)
        inode, xattrs = await self.load(number)
        await self._prepare_change(len(value) + 4096)
        check_flags(xattrs, name, flags)
        self._put(inode, xattrs, name, value)

    def _put(self, inode: Inode, xattrs: dict[bytes, bytes], name: bytes, value: bytes) -> None:
        if name not in xattrs and len(xattrs) >= XATTRS_PER_INODE_MAX:
            raise FsError(errno.ENOSPC)
        xattrs[name] = value
        self._record(inode, name, value, set_xattr(inode, name, value))

    @by_lease
    async def set_acl(
        self, number: int, name: bytes, value: bytes, *, clears_setgid: bool = False
    ) -> None:
        """Set an access list, and the mode with it, or a directory's default list.

        EINVAL for a malformed one, EACCES for a default list on anything but a directory.
        """
        entries = acl.parse(value)
        inode, xattrs = await self.load(number)
        await self._prepare_change(len(value) + 4096)
        if name == acl.DEFAULT and not inode.is_directory:
            raise FsError(errno.EACCES)
        if name == acl.ACCESS and entries:
            inode.mode = _mode_with(inode.mode, entries, clears_setgid=clears_setgid)
        if not entries or (name == acl.ACCESS and acl.is_minimal(entries)):
            self._drop(inode, xattrs, name)
        else:
            self._put(inode, xattrs, name, value)

    async def acl_of(self, number: int, name: bytes) -> acl.Acl:
        """A stored list, empty if there is none; from memory where there are no attributes."""
        inode = await self._directories.fresh(number)
        if inode.xattrs is not None and not inode.xattrs:
            return ()
        _, xattrs = await self.load(number)
        return acl.parse(xattrs[name]) if name in xattrs else ()

    def keep_acl(self, inode: Inode, name: bytes, entries: acl.Acl) -> None:
        """Store a list whose mode the inode has already. No checkpoint; room is the caller's."""
        assert inode.xattrs is not None
        self._put(inode, inode.xattrs, name, acl.encode(entries))

    @by_lease
    async def remove(self, number: int, name: bytes) -> None:
        """Remove an attribute; ENODATA."""
        _check_namespace(name)
        inode, xattrs = await self.load(number)
        await self._prepare_change(4096)
        if name not in xattrs and name not in (acl.ACCESS, acl.DEFAULT):
            raise FsError(errno.ENODATA)
        self._drop(inode, xattrs, name)

    def _drop(self, inode: Inode, xattrs: dict[bytes, bytes], name: bytes) -> None:
        """Remove an attribute if it is there; what else has changed is recorded either way."""
        if xattrs.pop(name, None) is None:
            inode.ctime_ns = self.volume.runtime.now_ns()
            self.volume.record(None, touched=(inode,))
            return
        self._record(inode, name, None, set_xattr(inode, name, None))

    def _record(
        self, inode: Inode, name: bytes, value: bytes | None, operation: m.SetXattr
    ) -> None:
        inode.ctime_ns = self.volume.runtime.now_ns()
        if inode.is_reaped:
            return  # a path that was found before its name went: the satellite has no such inode
        state = journal.XattrState(inode.number, name, value)
        self.volume.record(operation, xattrs=(state,), touched=(inode,))


def _mode_with(mode: int, entries: acl.Acl, *, clears_setgid: bool) -> int:
    mode = mode & 0o7000 | acl.mode_of(entries)
    return mode & ~0o2000 if clears_setgid else mode


class SharedXattrs:
    """The changes of `Xattrs` under the same names, decided by the satellite."""

    def __init__(self, xattrs: Xattrs, direct: DirectCalls) -> None:
        self._xattrs = xattrs
        self._volume = xattrs.volume
        self._direct = direct

    async def set(self, number: int, name: bytes, value: bytes, flags: int = 0) -> None:
        """See Xattrs."""
        check_new(name, value)
        # The flags say what must be there; without one, whoever comes last wins.
        was_there = bool(flags & XATTR_REPLACE) if flags else None

        async def change() -> None:
            inode, xattrs = await self._xattrs.load(number)
            check_flags(xattrs, name, flags)
            if name not in xattrs and len(xattrs) >= XATTRS_PER_INODE_MAX:
                raise FsError(errno.ENOSPC)
            await self._decide(inode, name, value, was_there)

        await retried(change)

    async def remove(self, number: int, name: bytes) -> None:
        """See Xattrs."""
        _check_namespace(name)
        inode, xattrs = await self._xattrs.load(number)
        if name not in xattrs and name not in (acl.ACCESS, acl.DEFAULT):
            raise FsError(errno.ENODATA)
        await self._decide(inode, name, None)

    async def _decide(
        self, inode: Inode, name: bytes, value: bytes | None, was_there: bool | None = None
    ) -> None:
        now, watch = self._volume.runtime.now_ns(), Watch(self._volume)
        xattrs, inode.xattrs = inode.xattrs, None  # not known until it is decided
        operation = set_xattr(inode, name, value, was_there=was_there)
        await self._direct.decide(operation, m.Touch(inode.number, None, now))
        inode.ctime_ns = now
        if not watch.end() or xattrs is None:
            inode.xattrs, inode.is_stale = None, True
            return
        if value is None:
            xattrs.pop(name, None)
        else:
            xattrs[name] = value
        inode.xattrs = xattrs

    async def set_acl(
        self, number: int, name: bytes, value: bytes, *, clears_setgid: bool = False
    ) -> None:
        """See Xattrs."""
        entries = acl.parse(value)

        async def change() -> None:
            inode, _ = await self._xattrs.load(number)
            if name == acl.DEFAULT and not inode.is_directory:
                raise FsError(errno.EACCES)
            attributes = replace(inode.attributes, ctime_ns=self._volume.runtime.now_ns())
            if name == acl.ACCESS and entries:
                mode = _mode_with(inode.mode, entries, clears_setgid=clears_setgid)
                attributes = replace(attributes, mode=mode)
            is_dropped = not entries or (name == acl.ACCESS and acl.is_minimal(entries))
            operation = building.set_attributes(self._volume, inode, attributes)
            kept = set_xattr(inode, name, None if is_dropped else value)
            await decide_attributes(self._volume, self._direct, inode, operation, [operation, kept])
            inode.xattrs = None

        await retried(change)


def check_new(name: bytes, value: bytes) -> None:
    """Whether an attribute can be: ERANGE, EOPNOTSUPP, EINVAL, E2BIG."""
    if not 1 <= len(name) <= NAME_BYTES_MAX:
        raise FsError(errno.ERANGE)
    _check_namespace(name)
    if len(value) > XATTR_VALUE_BYTES_MAX:
        raise FsError(errno.E2BIG)


def check_flags(xattrs: dict[bytes, bytes], name: bytes, flags: int) -> None:
    """XATTR_CREATE and XATTR_REPLACE: EEXIST, ENODATA."""
    if flags & XATTR_CREATE and name in xattrs:
        raise FsError(errno.EEXIST)
    if flags & XATTR_REPLACE and name not in xattrs:
        raise FsError(errno.ENODATA)


def _check_namespace(name: bytes) -> None:
    if name in (acl.ACCESS, acl.DEFAULT):
        return
    namespace, dot, rest = name.partition(b".")
    if not dot or namespace not in _NAMESPACES:
        raise FsError(errno.EOPNOTSUPP)
    if not rest:
        raise FsError(errno.EINVAL)

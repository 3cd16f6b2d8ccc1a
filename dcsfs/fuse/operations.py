"""pyfuse3 handlers: convert, call the file system, convert back.

One guard turns every exception into an errno: in pyfuse3 anything but FUSEError ends the mount.
A handler waits for the network only for data that is not here, and never past its deadline.
"""

import errno
import functools
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio

from dcsfs.fs import acl
from dcsfs.fs.building import Caller, Changes
from dcsfs.fs.directories import Scan
from dcsfs.fs.errors import FsError, NotInMemory, errno_of
from dcsfs.fs.filesystem import FileSystem
from dcsfs.fs.state import Inode
from dcsfs.fs.xattrs import XATTR_CREATE, XATTR_REPLACE
from network.errors import DcsError
from network.limits import CACHE_SPACE_DEADLINE_S, NAME_BYTES_MAX, UNCACHED_READ_DEADLINE_S
from network.messages import Kind
from network.process import kernel_version

log = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")

HANDLER_DEADLINE_S = CACHE_SPACE_DEADLINE_S + UNCACHED_READ_DEADLINE_S
CACHE_TIMEOUT_S = 300.0
"""Entries and attributes under the lease: nobody else can change them."""
CACHE_TIMEOUT_READ_ONLY_S = 1.0
CAN_EXPIRE_NAMES = kernel_version() >= (6, 2)
"""Whether the kernel can be told to look a name up again without dropping it on the spot.

Dropping a directory's name makes it a deleted one for programs that work in it, and detaches what
is mounted below. Older kernels keep names of directories for a second only.
"""
DIRECTORY_NAME_TIMEOUT_S = 1.0
RECALLS_MAX = 8
"""Inodes that one handler may have loaded again: a rename has four, and directories above them."""
FUSE_ROOT = 1
DOTS = 2
"""Entries of every directory that have no dentry: `.` and `..`."""
STATFS_BLOCK_BYTES = 4096
STATFS_FREE_BYTES = 1 << 50
"""Shown for a bucket without quota: 1 PiB, so that installers and copiers go ahead."""


def kernel_number(filesystem: FileSystem, number: int) -> pyfuse3.InodeT:
    """What the kernel calls an inode: the mounted root is 1, whatever subtree it is."""
    return pyfuse3.InodeT(FUSE_ROOT if number == filesystem.root.number else number)


def guarded(
    handler: Callable[Concatenate["DcsOperations", P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate["DcsOperations", P], Coroutine[Any, Any, R]]:
    """Turn every exception of a handler into FUSEError, and bound its time.

    A handler that meets an inode that is not in memory is begun again once it is: it meets it
    before it changes anything.
    """

    @functools.wraps(handler)
    async def guard(self: "DcsOperations", *args: P.args, **kwargs: P.kwargs) -> R:
        began = self.residence.begin()
        try:
            with trio.fail_after(self.deadline_s):
                for _ in range(RECALLS_MAX):
                    try:
                        return await handler(self, *args, **kwargs)
                    except NotInMemory as error:
                        await self.residence.recall(error.number)
                return await handler(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except FsError as error:
            raise pyfuse3.FUSEError(error.errno) from error
        except (DcsError, OSError, trio.TooSlowError) as error:
            self.note_error(handler.__name__, error)
            raise pyfuse3.FUSEError(errno_of(error)) from error
        except Exception as error:
            log.exception("handler failed: %s", handler.__name__)
            raise pyfuse3.FUSEError(errno_of(error)) from error
        finally:
            self.residence.end(began)

    return guard  # type: ignore[return-value]  # wraps() hides that the signature is the same


class DcsOperations(pyfuse3.Operations):
    """The handlers of one mount. The kernel's root inode is 1 whatever subtree is mounted."""

    supports_dot_lookup = True
    """An NFS server finds what a client's handle names by looking up `.` in it."""
    enable_acl = True

    def __init__(self, filesystem: FileSystem, *, writeback_cache: bool) -> None:
        super().__init__()
        self._fs = filesystem
        self.residence = filesystem.residence
        self._scans: dict[int, Scan] = {}
        self._next_scan = 1
        self.enable_writeback_cache = writeback_cache
        self.deadline_s = HANDLER_DEADLINE_S
        self._probe: tuple[object, bool] = (None, False)
        """The context of the last getxattr, and whether the attribute was there."""
        self.recent_errors: list[str] = []

    def note_error(self, name: str, error: BaseException) -> None:
        """Remember an error for the status command."""
        text = f"{name}: {error}"
        log.warning("%s", text)
        self.recent_errors = [*self.recent_errors[-9:], text]

    def _timeouts(self, inode: Inode) -> tuple[float, float]:
        """How long the kernel may keep (entry, attributes).

        Shared: attributes as long as the satellite vouches for them; names not at all, because
        the kernel cannot drop one while it waits for us about its directory (decisions/0008).
        """
        if self._fs.is_read_only:
            return CACHE_TIMEOUT_READ_ONLY_S, CACHE_TIMEOUT_READ_ONLY_S
        volume = self._fs.volume
        if not volume.is_shared:
            names = CACHE_TIMEOUT_S
            if inode.is_directory and not CAN_EXPIRE_NAMES:
                names = DIRECTORY_NAME_TIMEOUT_S
            return names, CACHE_TIMEOUT_S
        if inode.is_stale:
            return 0.0, 0.0
        return 0.0, max(0.0, volume.trusted_until - trio.current_time())

    def _number(self, inode: int) -> int:
        return self._fs.root.number if inode == FUSE_ROOT else inode

    def _attributes(self, inode: Inode) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = kernel_number(self._fs, inode.number)
        entry.generation = inode.generation
        entry.entry_timeout, entry.attr_timeout = self._timeouts(inode)
        entry.st_mode = pyfuse3.ModeT((inode.kind << 12) | inode.mode)
        entry.st_nlink = inode.nlink
        entry.st_uid = inode.uid
        entry.st_gid = inode.gid
        entry.st_rdev = inode.rdev
        entry.st_size = inode.size
        entry.st_blksize = 1 << 20
        entry.st_blocks = -(-inode.stored_bytes // 512)
        entry.st_atime_ns = inode.atime_ns
        entry.st_mtime_ns = inode.mtime_ns
        entry.st_ctime_ns = inode.ctime_ns
        return entry

    def _entry(self, inode: Inode) -> pyfuse3.EntryAttributes:
        """Attributes of an inode whose reference the kernel will hold."""
        inode.lookup_count += 1
        return self._attributes(inode)

    @staticmethod
    def _caller(ctx: pyfuse3.RequestContext) -> Caller:
        return Caller(ctx.uid, ctx.gid, ctx.umask)

    @guarded
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find a name."""
        return self._entry(await self._fs.directories.lookup(self._number(parent_inode), name))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Drop references; never raises: the kernel expects no answer."""
        for number, count in inode_list:
            try:
                self._fs.forget(self._number(number), count)
            except Exception:
                log.exception("forgetting inode %d failed", number)

    @guarded
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Attributes of an inode."""
        return self._attributes(await self._fs.directories.fresh(self._number(inode)))

    @guarded
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """chmod, chown, truncate, utimens."""
        changes = Changes(
            mode=attr.st_mode & 0o7777 if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
            ctime_ns=attr.st_ctime_ns if fields.update_ctime else None,
        )
        return self._attributes(await self._fs.set_attributes(self._number(inode), changes))

    @guarded
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        """A symbolic link's target."""
        return self._fs.inode(self._number(inode)).symlink

    async def _make(
        self, parent: int, name: bytes, kind: Kind, mode: int, ctx: pyfuse3.RequestContext,
        **extra: Any,
    ) -> pyfuse3.EntryAttributes:  # fmt: skip
        inode = await self._fs.create_node(
            self._number(parent), name, kind, mode, self._caller(ctx), **extra
        )
        return self._entry(inode)

    @guarded
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Make a file or special file."""
        kind = Kind(mode >> 12 or Kind.FILE)
        return await self._make(parent_inode, name, kind, mode, ctx, rdev=rdev)

    @guarded
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Make a directory."""
        return await self._make(parent_inode, name, Kind.DIRECTORY, mode, ctx)

    @guarded
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Make a symbolic link."""
        inode = await self._fs.create_node(
            self._number(parent_inode), name, Kind.SYMLINK, 0o777, self._caller(ctx), target=target
        )
        return self._entry(inode)

    @guarded
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Remove a file's name."""
        await self._fs.unlink(self._number(parent_inode), name)

    @guarded
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Remove an empty directory."""
        await self._fs.rmdir(self._number(parent_inode), name)

    @guarded
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        """Rename, with NOREPLACE and EXCHANGE."""
        await self._fs.rename(
            self._number(parent_inode_old), name_old,
            self._number(parent_inode_new), name_new, flags,
        )  # fmt: skip

    @guarded
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Add a hard link."""
        made = await self._fs.link(self._number(inode), self._number(new_parent_inode), new_name)
        return self._entry(made)

    @guarded
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open a file."""
        handle = await self._fs.open(self._number(inode), flags)
        return self._file_info(handle)

    def _file_info(self, handle: int) -> pyfuse3.FileInfo:
        """The kernel keeps the pages it has unless others have changed the file since."""
        inode = self._fs.handle_inode(handle)
        is_same = inode.kernel_changes == inode.foreign_changes
        inode.kernel_changes = inode.foreign_changes
        return pyfuse3.FileInfo(
            fh=pyfuse3.FileHandleT(handle), keep_cache=is_same and not self._fs.is_read_only
        )

    @guarded
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """Make and open a file."""
        handle, inode = await self._fs.create(
            self._number(parent_inode), name, mode, flags, self._caller(ctx)
        )
        return self._file_info(handle), self._entry(inode)

    @guarded
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Read; the reply may be a view of cached memory."""
        return await self._fs.read(fh, off, size)  # type: ignore[return-value]  # any buffer will do

    @guarded
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Stage bytes in the local log."""
        try:
            return await self._fs.write(fh, off, buf)
        except FsError as error:
            if error.errno != errno.EDQUOT or not self.enable_writeback_cache:
                raise
            # Of what its write-back meets the kernel tells a program ENOSPC, or else EIO.
            raise FsError(errno.ENOSPC, str(error)) from error

    @guarded
    async def flush(self, fh: int) -> None:
        """close(2): the bytes are staged; a shared mount commits them."""
        await self._fs.flush(fh)

    @guarded
    async def release(self, fh: int) -> None:
        """Drop a handle."""
        self._fs.release(fh)

    @guarded
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Everything done to the file is on disk when this returns."""
        await self._fs.fsync(self._fs.handle_inode(fh).number)

    @guarded
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """Begin to read a directory."""
        found = self._fs.inode(self._number(inode))
        handle = self._next_scan
        self._next_scan += 1
        self._scans[handle] = Scan(self._fs.directories, found.number)
        return handle

    def _scan(self, handle: int) -> Scan:
        found = self._scans.get(handle)
        if found is None:
            raise FsError(errno.EBADF)
        return found

    @guarded
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Everything done to the directory is on disk when this returns."""
        await self._fs.fsync(self._scan(fh).number)

    @guarded
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List with attributes; the cookie is the permanent dentry id, after those of the dots."""
        scan = self._scan(fh)
        if start_id < DOTS and not self._list_dots(scan.number, start_id, token):
            return
        for dentry_id, name, inode in await scan.after(max(0, start_id - DOTS)):
            attributes, cookie = self._attributes(inode), dentry_id + DOTS
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), attributes, cookie):
                break
            inode.lookup_count += 1

    def _list_dots(self, number: int, start_id: int, token: pyfuse3.ReaddirToken) -> bool:
        """List `.` and `..`; False if there is no room. The kernel counts no references to them."""
        inode = self._fs.inode(number)
        above = number if inode is self._fs.root else inode.parent
        for cookie, name, shown in ((1, b".", number), (2, b"..", above)):
            if cookie <= start_id:
                continue
            attributes = self._attributes(inode)
            attributes.st_ino = kernel_number(self._fs, shown)
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), attributes, cookie):
                return False
        return True

    async def releasedir(self, fh: int) -> None:
        """The directory is not read any more."""
        self._scans.pop(fh, None)

    @guarded
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Size and room by the bucket's quota; generous if it has none."""
        space = self._fs.space
        await space.refresh()
        free = space.free_bytes if space.quota_bytes else STATFS_FREE_BYTES
        size = space.quota_bytes or STATFS_FREE_BYTES + space.used_bytes
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = STATFS_BLOCK_BYTES
        data.f_blocks = -(-size // STATFS_BLOCK_BYTES)
        data.f_bfree = data.f_bavail = free // STATFS_BLOCK_BYTES
        data.f_files = data.f_ffree = data.f_favail = 1 << 40
        data.f_namemax = NAME_BYTES_MAX
        return data

    @guarded
    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        """The kernel checks permissions (default_permissions)."""
        return True

    @guarded
    async def setxattr(
        self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        """Set an extended attribute or an access control list."""
        number = self._number(inode)
        if name not in (acl.ACCESS, acl.DEFAULT):
            await self._fs.xattrs.set(number, name, value, self._flags_of(ctx))
            return
        # The kernel asks for this with a flag that pyfuse3 does not hand on (setxattr(2), ACLs).
        groups = {ctx.gid, *pyfuse3.get_sup_groups(ctx.pid)} if ctx.uid else set()
        is_stranger = bool(ctx.uid) and self._fs.inode(number).gid not in groups
        await self._fs.xattrs.set_acl(number, name, value, clears_setgid=is_stranger)

    def _flags_of(self, ctx: pyfuse3.RequestContext) -> int:
        """XATTR_CREATE, XATTR_REPLACE or 0 of the setxattr that has this context.

        pyfuse3 hands no flags on: it asks getxattr first, with the same context object, and goes
        on, without a checkpoint in between, when the answer suits the flag.
        """
        asked_by, was_there = self._probe
        if asked_by is not ctx:
            return 0
        return XATTR_REPLACE if was_there else XATTR_CREATE

    @guarded
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """Read an extended attribute."""
        try:
            value = await self._fs.xattrs.get(self._number(inode), name)
        except FsError:
            self._probe = (ctx, False)
            raise
        self._probe = (ctx, True)
        return value

    @guarded
    async def listxattr(
        self, inode: int, ctx: pyfuse3.RequestContext
    ) -> Sequence[pyfuse3.XAttrNameT]:
        """Names of extended attributes."""
        names = await self._fs.xattrs.names(self._number(inode))
        return [pyfuse3.XAttrNameT(name) for name in names]

    @guarded
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Remove an extended attribute."""
        await self._fs.xattrs.remove(self._number(inode), name)

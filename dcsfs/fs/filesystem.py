"""The file system: POSIX operations on a volume.

Every method that changes something first makes sure that what it needs is in memory (that may
wait for the satellite), then checks and changes without a checkpoint, so that concurrent
operations see it done or not begun. Errors are FsError with POSIX's errno.
"""

import errno
import os
from dataclasses import dataclass

import trio

from dcsfs.fs import acl, building, throttle
from dcsfs.fs.building import RENAME_EXCHANGE, RENAME_NOREPLACE, Caller, Changes
from dcsfs.fs.direct import DirectCalls
from dcsfs.fs.directories import Directories
from dcsfs.fs.errors import FsError, errno_of
from dcsfs.fs.journal import DentryState
from dcsfs.fs.lease import LeaseChanged, by_lease
from dcsfs.fs.reader import Reader, ReadState
from dcsfs.fs.residence import Residence
from dcsfs.fs.shared import SharedNames
from dcsfs.fs.space import Space
from dcsfs.fs.state import Dentry, Inode
from dcsfs.fs.volume import Volume
from dcsfs.fs.writeback import Writeback
from dcsfs.fs.xattrs import Xattrs
from network import messages as m
from network.limits import (
    CACHE_SPACE_DEADLINE_S,
    FILE_BYTES_MAX,
)
from network.messages import Kind


@dataclass(slots=True)
class Handle:
    """An open file."""

    inode: Inode
    read_state: ReadState


class FileSystem:
    """Operations on one volume; `subtree` is the inode that is mounted as the root."""

    def __init__(
        self,
        volume: Volume,
        reader: Reader,
        writeback: Writeback | None,
        direct: DirectCalls | None,
        *,
        log_bytes_max: int,
        sync_to_network: bool = False,
        root: Inode | None = None,
    ) -> None:
        self.volume = volume
        self._reader = reader
        self._writeback = writeback
        self._log_bytes_max = log_bytes_max
        self.sync_to_network = sync_to_network
        self.root = root or volume.root
        self._handles: dict[int, Handle] = {}
        self._next_handle = 1
        self.directories = Directories(volume)
        self.space = Space(volume, reader, writeback)
        self.residence = Residence(volume, lambda: self.root)
        self.xattrs = Xattrs(
            volume, self.directories, direct, self.check_writable, self._prepare_change
        )
        self.shared: SharedNames | None = None
        """Stands in for the methods that are `by_lease`; None on a read-only mount."""
        if writeback is not None and direct is not None:
            self.shared = SharedNames(volume, self.directories, direct, writeback, self.xattrs)
        self.is_read_only = volume.is_read_only

    @property
    def open_handles(self) -> int:
        """How many files are open."""
        return len(self._handles)

    def _now(self) -> int:
        return self.volume.runtime.now_ns()

    def inode(self, number: int) -> Inode:
        """An inode by number; ESTALE if unknown."""
        return self.volume.get(number)

    def forget(self, number: int, count: int) -> None:
        """The kernel drops `count` references; never raises."""
        inode = self.volume.inodes.get(number)
        if inode is None:
            self.residence.forget(number, count)
            return
        inode.lookup_count -= count
        self._reap_if_unused(inode)
        if inode.is_reaped and not inode.is_in_use:
            del self.volume.inodes[number]

    def check_writable(self) -> None:
        """EROFS on a read-only mount, and after the cache disk has failed."""
        if self.is_read_only or self.volume.is_read_only:
            raise FsError(errno.EROFS)
        if self.volume.log.failure is not None:
            raise FsError(errno.EROFS, "the cache disk failed")

    async def _prepare_change(self, count: int) -> None:
        """Refuse on a read-only mount, then have room for `count` bytes in the log."""
        self.check_writable()
        await self._wait_for_room(count)

    async def start(self) -> None:
        """Have the root's entries in memory, so that names can be made there when offline."""
        if not self.volume.is_read_only:
            await self.directories.complete(self.root)

    async def _wait_for_room(self, count: int, *, needs_lease: bool = True) -> None:
        """Hold a writer back while the log is full; ENOSPC after a minute without progress.

        Raises LeaseChanged when a change that is answered here may not be any more.
        """
        log = self.volume.log
        if log.used_bytes > throttle.LINE * self._log_bytes_max:
            await self._slow_down(count)
        if log.has_room(count, self._log_bytes_max):
            if needs_lease and self.volume.is_shared:
                raise LeaseChanged
            self._reserve(count)
            return
        assert self._writeback is not None
        deadline = trio.current_time() + CACHE_SPACE_DEADLINE_S
        level = log.disk_bytes
        while not log.has_room(count, self._log_bytes_max):
            self._writeback.demand()
            if trio.current_time() > deadline:
                raise FsError(errno.ENOSPC, "the cache is full and the network takes nothing")
            with trio.move_on_after(1.0):
                await self._writeback.next_progress()
            if log.disk_bytes < level:
                level = log.disk_bytes
                deadline = trio.current_time() + CACHE_SPACE_DEADLINE_S
        if needs_lease and self.volume.is_shared:
            raise LeaseChanged
        self._reserve(count)

    async def _slow_down(self, count: int) -> None:
        """Hold a writer back for as long as the log's filling asks for."""
        assert self._writeback is not None
        if not self.volume.queue:
            self._writeback.demand()
        await trio.sleep(
            throttle.wait_s(
                count,
                self.volume.log.used_bytes,
                self._log_bytes_max,
                self._writeback.drain_rate.at(trio.current_time()),
            )
        )

    def _reserve(self, count: int) -> None:
        try:
            self.volume.log.reserve(count)
        except OSError as error:
            raise FsError(errno.ENOSPC, f"the cache disk is full: {error}") from error

    def _new_child(
        self,
        parent: Inode,
        name: bytes,
        kind: Kind,
        mode: int,
        caller: Caller,
        *,
        rdev: int = 0,
        target: bytes = b"",
    ) -> Inode:
        """Make an inode with its first name. No checkpoint."""
        if name in parent.children:
            raise FsError(errno.EEXIST)
        made = building.new_child(
            self.volume, parent, name, kind, mode, caller, rdev=rdev, target=target
        )
        inode, dentry = made.inode, made.dentry
        self.volume.inodes[inode.number] = inode
        parent.children[name] = dentry
        parent.absent.discard(name)
        if kind is Kind.DIRECTORY:
            parent.nlink += 1
        parent.mtime_ns = parent.ctime_ns = inode.ctime_ns
        self.volume.record(
            made.operation,
            inodes=(inode,),
            dentries=(DentryState(parent.number, name, dentry.dentry_id, inode.number, kind),),
            touched=(parent,),
        )
        return inode

    @by_lease
    async def create_node(
        self,
        parent_number: int,
        name: bytes,
        kind: Kind,
        mode: int,
        caller: Caller,
        *,
        rdev: int = 0,
        target: bytes = b"",
    ) -> Inode:
        """Create a file, directory, symbolic link or special file; EEXIST.

        The parent's default access list decides on the mode if there is one, else the umask.
        """
        self.check_writable()
        parent = await self.directories.fresh_directory(parent_number)
        await self.directories.learn(parent, name)
        default: acl.Acl = ()
        if kind is not Kind.SYMLINK:
            default = await self.xattrs.acl_of(parent_number, acl.DEFAULT)
        await self._wait_for_room(8192 + 2 * len(acl.encode(default)))
        self.directories.get(parent_number)
        if not default:
            mode &= ~caller.umask
            return self._new_child(parent, name, kind, mode, caller, rdev=rdev, target=target)
        access = acl.inherit(default, mode)
        mode = mode & 0o7000 | acl.mode_of(access)
        inode = self._new_child(parent, name, kind, mode, caller, rdev=rdev, target=target)
        if not acl.is_minimal(access):
            self.xattrs.keep_acl(inode, acl.ACCESS, access)
        if kind is Kind.DIRECTORY:
            self.xattrs.keep_acl(inode, acl.DEFAULT, default)
        return inode

    @by_lease
    async def link(self, number: int, parent_number: int, name: bytes) -> Inode:
        """Add a name to a file; EPERM for a directory."""
        self.check_writable()
        inode = await self.directories.fresh(number)
        parent = await self.directories.fresh_directory(parent_number)
        if inode.is_directory:
            raise FsError(errno.EPERM)
        await self.directories.learn(parent, name)
        await self._wait_for_room(4096)
        self.directories.get(parent_number)
        if name in parent.children:
            raise FsError(errno.EEXIST)
        if inode.nlink == 0:
            raise FsError(errno.ENOENT)
        now, dentry_id = self._now(), self.volume.new_number()
        encrypted, wrapped = building.wrap(self.volume, parent, name, inode)
        inode.nlink += 1
        inode.ctime_ns = parent.mtime_ns = parent.ctime_ns = now
        parent.children[name] = Dentry(dentry_id, name, number, inode.kind)
        parent.absent.discard(name)
        self.volume.record(
            m.Link(parent_number, encrypted, dentry_id, wrapped, number),
            dentries=(DentryState(parent_number, name, dentry_id, number, inode.kind),),
            touched=(parent, inode),
        )
        return inode

    @by_lease
    async def unlink(self, parent_number: int, name: bytes) -> None:
        """Remove a name; EISDIR for a directory."""
        self.check_writable()
        parent = await self.directories.fresh_directory(parent_number)
        await self.directories.learn(parent, name)
        await self._wait_for_room(4096)
        dentry, inode = self.directories.child(parent, name)
        if inode.is_directory:
            raise FsError(errno.EISDIR)
        self._remove(parent, dentry, inode)

    @by_lease
    async def rmdir(self, parent_number: int, name: bytes) -> None:
        """Remove an empty directory; ENOTDIR, ENOTEMPTY."""
        self.check_writable()
        parent = await self.directories.fresh_directory(parent_number)
        await self.directories.learn(parent, name)
        _, inode = self.directories.child(parent, name)
        if not inode.is_directory:
            raise FsError(errno.ENOTDIR)
        is_empty = await self.directories.is_empty(inode)
        await self._wait_for_room(4096)
        dentry, inode = self.directories.child(parent, name)
        if inode.children or not is_empty:
            raise FsError(errno.ENOTEMPTY)
        self._remove(parent, dentry, inode)

    def _remove(self, parent: Inode, dentry: Dentry, inode: Inode) -> None:
        now = self._now()
        self._drop_name(parent, dentry, inode, now)
        removed = DentryState(parent.number, dentry.name, dentry.dentry_id, 0, dentry.kind)
        operation = m.Unlink(parent.number, parent.key.encrypt_name(dentry.name), inode.number)
        self.volume.record(
            operation,
            inodes=(inode,),
            dentries=(removed,),
            touched=(parent, inode) if inode.nlink else (parent,),
        )
        self._reap_if_unused(inode)

    def _drop_name(self, parent: Inode, dentry: Dentry, inode: Inode, now: int) -> None:
        del parent.children[dentry.name]
        parent.absent.add(dentry.name)
        parent.mtime_ns = parent.ctime_ns = inode.ctime_ns = now
        if inode.is_directory:
            inode.nlink = 0
            parent.nlink -= 1
        else:
            inode.nlink -= 1

    def _reap_if_unused(self, inode: Inode) -> None:
        """Give up an inode without names, once the kernel, too, has no way to it any more.

        A program may have found a name just before it went, and open it now.
        """
        is_sure = not (self.volume.is_shared and inode.is_stale)
        if inode.nlink == 0 and not inode.is_in_use and is_sure and not self.volume.is_read_only:
            self.volume.reap(inode)

    @by_lease
    async def rename(
        self, parent_number: int, name: bytes, new_parent_number: int, new_name: bytes, flags: int
    ) -> None:
        """Rename, with NOREPLACE or EXCHANGE; EINVAL for other flags."""
        self.check_writable()
        if flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            raise FsError(errno.EINVAL)
        parent = await self.directories.fresh_directory(parent_number)
        new_parent = await self.directories.fresh_directory(new_parent_number)
        await self.directories.learn(parent, name)
        await self.directories.learn(new_parent, new_name)
        target = new_parent.children.get(new_name)
        is_empty = True
        if target is not None and target.kind is Kind.DIRECTORY and flags == 0:
            is_empty = await self.directories.is_empty(self.volume.get(target.child))
        await self._wait_for_room(4096)
        self.directories.get(parent_number)
        self.directories.get(new_parent_number)
        dentry, inode = self.directories.child(parent, name)
        if inode.is_directory and self._is_below(new_parent, inode):
            raise FsError(errno.EINVAL)
        if flags == RENAME_EXCHANGE:
            self._exchange(parent, dentry, inode, new_parent, new_name)
            return
        replaced = new_parent.children.get(new_name)
        if replaced is not None:
            if flags == RENAME_NOREPLACE:
                raise FsError(errno.EEXIST)
            if replaced.child == inode.number:
                return
            self._check_replace(inode, self.volume.get(replaced.child), is_empty=is_empty)
        self._move(parent, dentry, inode, new_parent, new_name, replaced)

    def _is_below(self, directory: Inode, ancestor: Inode) -> bool:
        while True:
            if directory is ancestor:
                return True
            parent = self.volume.get(directory.parent)
            if parent is directory:
                return False
            directory = parent

    @staticmethod
    def _check_replace(inode: Inode, other: Inode, *, is_empty: bool) -> None:
        if inode.is_directory and not other.is_directory:
            raise FsError(errno.ENOTDIR)
        if not inode.is_directory and other.is_directory:
            raise FsError(errno.EISDIR)
        if other.is_directory and (other.children or not is_empty):
            raise FsError(errno.ENOTEMPTY)

    def _move(
        self,
        parent: Inode,
        dentry: Dentry,
        inode: Inode,
        new_parent: Inode,
        new_name: bytes,
        replaced: Dentry | None,
    ) -> None:
        now, dentry_id = self._now(), self.volume.new_number()
        encrypted, wrapped = building.wrap(self.volume, new_parent, new_name, inode)
        operation = m.Rename(
            parent.number, parent.key.encrypt_name(dentry.name), inode.number,
            new_parent.number, encrypted, dentry_id, wrapped,
            replaced.child if replaced else 0,
        )  # fmt: skip
        other = self.volume.get(replaced.child) if replaced else None
        if replaced is not None and other is not None:
            self._drop_name(new_parent, replaced, other, now)
        del parent.children[dentry.name]
        parent.absent.add(dentry.name)
        new_parent.children[new_name] = Dentry(dentry_id, new_name, inode.number, inode.kind)
        new_parent.absent.discard(new_name)
        if inode.is_directory:
            parent.nlink -= 1
            new_parent.nlink += 1
            inode.parent = new_parent.number
        for changed in (parent, new_parent):
            changed.mtime_ns = changed.ctime_ns = now
        inode.ctime_ns = now
        touched = [parent, inode] if parent is new_parent else [parent, new_parent, inode]
        if other is not None and other.nlink:
            touched.append(other)
        self.volume.record(
            operation,
            inodes=(other,) if other is not None else (),
            dentries=(
                DentryState(parent.number, dentry.name, dentry.dentry_id, 0, dentry.kind),
                DentryState(new_parent.number, new_name, dentry_id, inode.number, inode.kind),
            ),
            touched=touched,
        )
        if other is not None:
            self._reap_if_unused(other)

    def _exchange(
        self, parent: Inode, dentry: Dentry, inode: Inode, new_parent: Inode, new_name: bytes
    ) -> None:
        other_dentry, other = self.directories.child(new_parent, new_name)
        if other.is_directory and self._is_below(parent, other):
            raise FsError(errno.EINVAL)
        if other is inode:
            return
        now = self._now()
        there, wrapped = building.wrap(self.volume, new_parent, new_name, inode)
        here, other_wrapped = building.wrap(self.volume, parent, dentry.name, other)
        operation = m.Exchange(
            parent.number, here, inode.number, new_parent.number, there, other.number,
            wrapped, other_wrapped,
        )  # fmt: skip
        new_here = Dentry(dentry.dentry_id, dentry.name, other.number, other.kind)
        new_there = Dentry(other_dentry.dentry_id, new_name, inode.number, inode.kind)
        parent.children[dentry.name] = new_here
        new_parent.children[new_name] = new_there
        moved = other.is_directory - inode.is_directory
        if parent is not new_parent:
            parent.nlink += moved
            new_parent.nlink -= moved
        inode.parent, other.parent = new_parent.number, parent.number
        for changed in (parent, new_parent):
            changed.mtime_ns = changed.ctime_ns = now
        inode.ctime_ns = other.ctime_ns = now
        unique = {item.number: item for item in (parent, new_parent, inode, other)}
        states = (
            DentryState(parent.number, dentry.name, dentry.dentry_id, other.number, other.kind),
            DentryState(
                new_parent.number, new_name, other_dentry.dentry_id, inode.number, inode.kind
            ),
        )
        self.volume.record(operation, dentries=states, touched=tuple(unique.values()))

    @by_lease
    async def set_attributes(self, number: int, changes: Changes) -> Inode:
        """chmod, chown, truncate, utimens. Permission is the kernel's business."""
        self.check_writable()
        inode = await self.directories.fresh(number)
        access: acl.Acl = ()
        if changes.mode is not None:
            access = await self.xattrs.acl_of(number, acl.ACCESS)
        await self._wait_for_room(4096 + len(acl.encode(access)))
        if changes.size is not None:
            building.check_size(inode, changes.size)
        now = self._now()
        attributes = building.changed_attributes(inode, changes, now)
        if changes.size is not None:
            self.volume.truncate(inode, changes.size, now)
        building.put_attributes(inode, attributes)
        if access:
            self.xattrs.keep_acl(inode, acl.ACCESS, acl.with_mode(access, inode.mode))
            inode.ctime_ns = attributes.ctime_ns
        self.volume.record(None, touched=(inode,))
        return inode

    async def open(self, number: int, flags: int) -> int:
        """Open a file; returns a handle. O_TRUNC is honoured here.

        What others have committed before is seen through it.
        """
        inode = await self.directories.fresh(number)
        if inode.is_directory:
            raise FsError(errno.EISDIR)
        is_gone = inode.is_reaped and inode.nlink == 0
        if is_gone or inode.kind is not Kind.FILE:
            # What the kernel has found under the name is not what is there now: it looks again.
            raise FsError(errno.ESTALE)
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_TRUNC):
            self.check_writable()
        if flags & os.O_TRUNC:
            await self._wait_for_room(4096, needs_lease=False)
            self.volume.truncate(inode, 0, self._now())
        return self._add_handle(inode)

    def _add_handle(self, inode: Inode) -> int:
        handle = self._next_handle
        self._next_handle += 1
        inode.open_count += 1
        self._handles[handle] = Handle(inode, ReadState())
        return handle

    async def create(
        self, parent_number: int, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[int, Inode]:
        """open(O_CREAT): make the file, or open what another mount has just made, unless O_EXCL.

        ESTALE where the kernel must look first: it checks permissions of what it knows is there.
        """
        try:
            inode = await self.create_node(parent_number, name, Kind.FILE, mode, caller)
        except FsError as error:
            if error.errno != errno.EEXIST or flags & os.O_EXCL:
                raise
            inode = await self.directories.lookup(parent_number, name)
            if not _may_open(inode, flags, caller):
                raise FsError(errno.ESTALE) from error
            return await self.open(inode.number, flags), inode
        return self._add_handle(inode), inode

    def _handle(self, handle: int) -> Handle:
        found = self._handles.get(handle)
        if found is None:
            raise FsError(errno.EBADF)
        return found

    def handle_inode(self, handle: int) -> Inode:
        """The inode behind a handle; EBADF."""
        return self._handle(handle).inode

    async def read(self, handle: int, offset: int, size: int) -> bytes | memoryview:
        """Read; shorter at the end of the file."""
        found = self._handle(handle)
        if found.inode.is_stale:
            await self.directories.fresh(found.inode.number)
        return await self._reader.read(found.inode, offset, size, found.read_state)

    async def write(self, handle: int, offset: int, data: bytes | memoryview) -> int:
        """Stage bytes locally; durable after `fsync`. ENOSPC when log and network are full."""
        inode = self._handle(handle).inode
        self.check_writable()
        if not data:
            return 0
        if offset + len(data) > FILE_BYTES_MAX:
            raise FsError(errno.EFBIG)
        if inode.is_stale:
            await self.directories.fresh(inode.number)
        await self.space.check_write(inode, offset, len(data))
        await self._wait_for_room(len(data) + 4096, needs_lease=False)
        await self.space.check_write(inode, offset, len(data))  # others have written meanwhile
        view = memoryview(data)
        try:
            self.volume.stage(inode, offset, view, self._now())
        except OSError as error:
            code = errno.EIO if self.volume.log.failure is not None else errno.ENOSPC
            raise FsError(code, f"the cache disk took no more: {error}") from error
        mode = building.without_set_id(inode.mode)
        if mode != inode.mode:
            await self.set_attributes(inode.number, Changes(mode=mode, mtime_ns=inode.mtime_ns))
        if self._writeback is not None:
            self._writeback.note_write()
        return len(data)

    async def flush(self, handle: int) -> None:
        """close(2): a shared mount commits what was written, so that the next open sees it.

        Bounded by CLOSE_COMMIT_DEADLINE_S; what is not committed then stays staged.
        """
        inode = self._handle(handle).inode
        if self.volume.is_shared and self.shared is not None:
            await self.shared.flush(inode)
        self._report_refusal(inode)

    def _report_refusal(self, inode: Inode) -> None:
        """EACCES or EDQUOT while the network refuses what is staged; it stays in the log."""
        refusal = self._writeback.refusal if self._writeback is not None else None
        if refusal is not None and (inode.layers or inode.number in self.volume.open_batch.touched):
            raise FsError(errno_of(refusal), str(refusal))

    async def fsync(self, number: int) -> None:
        """Return once everything done to this file or directory is on the local disk.

        With `sync=network`, once it is committed at the satellite. EACCES, EDQUOT when it is on
        the disk and the network refuses it.
        """
        if self.volume.is_read_only:
            return
        try:
            await self.volume.log.sync()
        except OSError as error:
            raise FsError(errno.EIO, f"the cache disk failed: {error}") from error
        self._report_refusal(self.volume.get(number))
        if self.sync_to_network:
            assert self._writeback is not None
            await self._writeback.drain(or_refusal=True)

    def release(self, handle: int) -> None:
        """Close a handle; the last one of an unlinked file drops its content."""
        found = self._handles.pop(handle, None)
        if found is None:
            return
        found.inode.open_count -= 1
        self._reap_if_unused(found.inode)
        if found.inode.is_reaped and not found.inode.is_in_use:
            self.volume.inodes.pop(found.inode.number, None)

    async def sync_everything(self, *, or_refusal: bool = False) -> None:
        """Return once everything is committed at the satellite (`dcsfs sync`); see `drain`."""
        if self._writeback is not None:
            await self.volume.log.sync()
            await self._writeback.drain(or_refusal=or_refusal)


def _may_open(inode: Inode, flags: int, caller: Caller) -> bool:
    """Whether root, or the owner by the mode alone, may open a file so."""
    wanted = {os.O_RDONLY: 0o4, os.O_WRONLY: 0o2}.get(flags & os.O_ACCMODE, 0o6)
    is_owner = caller.uid == inode.uid and inode.mode >> 6 & wanted == wanted
    return inode.kind is not Kind.FILE or caller.uid == 0 or is_owner

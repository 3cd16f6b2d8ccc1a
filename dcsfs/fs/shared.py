"""Changes to names and attributes while others write to the bucket too: the satellite decides.

Each change is built from what is known, sent, and done here only when the satellite has done it.
A precondition that fails means that what was known is old: it is loaded again and the change is
tried anew. POSIX's rules that need the whole tree (not empty, not below itself) are its business.
"""

import errno

import trio

from dcsfs.fs import acl, building
from dcsfs.fs.building import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    Caller,
    Changes,
    set_xattr,
)
from dcsfs.fs.direct import DirectCalls, Watch, decide_attributes, retried
from dcsfs.fs.directories import Directories
from dcsfs.fs.errors import FsError
from dcsfs.fs.state import Dentry, Inode
from dcsfs.fs.volume import Volume
from dcsfs.fs.writeback import Writeback
from dcsfs.fs.xattrs import Xattrs
from network import messages as m
from network.errors import PreconditionFailed
from network.limits import CLOSE_COMMIT_DEADLINE_S
from network.messages import Kind

Name = tuple[Inode, bytes, Dentry | None]
"""A directory, a name in it, and what that stands for after a change; None: nothing."""


class SharedNames:
    """The changes of `FileSystem` under the same names."""

    def __init__(
        self,
        volume: Volume,
        directories: Directories,
        direct: DirectCalls,
        writeback: Writeback,
        xattrs: Xattrs,
    ) -> None:
        self._volume = volume
        self._directories = directories
        self._direct = direct
        self._writeback = writeback
        self._xattrs = xattrs

    async def _decide(
        self,
        names: list[Name],
        touched: list[Inode],
        *operations: m.Operation,
    ) -> bool:
        """Have it decided, then remember what each name stands for, if nobody else changed any.

        Returns whether nothing else came to be known meanwhile; `touched` are loaded again if
        something did. On an error, or cancelled, the names are not known any more.
        """
        before = {id(directory): directory.name_changes for directory, _, _ in names}
        watch, is_done = Watch(self._volume), False
        try:
            await self._direct.decide(*operations)
            is_done = True
        finally:
            is_quiet = watch.end()
            for directory, name, dentry in names:
                is_current = is_done and directory.name_changes == before[id(directory)]
                self._volume.forget_name(directory, name)
                if is_current:
                    directory.unknown.discard(name)
                    if dentry is None:
                        directory.absent.add(name)
                    else:
                        directory.children[name] = dentry
            for directory, _, _ in names:
                directory.name_changes += 1  # answers that are on their way are too old
            if not (is_done and is_quiet):
                for inode in touched:
                    inode.is_stale = True
        return is_quiet

    async def flush(self, inode: Inode) -> None:
        """Have staged content at the satellite, or give up after the deadline: it stays staged."""
        if inode.layers and not inode.is_reaped:
            with trio.move_on_after(CLOSE_COMMIT_DEADLINE_S):
                await self._writeback.commit_inode(inode)

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
        """See FileSystem."""
        parent = await self._directories.fresh_directory(parent_number)
        await self._directories.learn(parent, name)
        if name in parent.children:
            raise FsError(errno.EEXIST)
        default: acl.Acl = ()
        if kind is not Kind.SYMLINK:
            default = await self._xattrs.acl_of(parent_number, acl.DEFAULT)
        access: acl.Acl = ()
        if default:
            access = acl.inherit(default, mode)
            mode = mode & 0o7000 | acl.mode_of(access)
        elif kind is not Kind.SYMLINK:
            mode &= ~caller.umask
        made = building.new_child(
            self._volume, parent, name, kind, mode, caller, rdev=rdev, target=target
        )
        inode, now = made.inode, made.inode.ctime_ns
        operations: list[m.Operation] = [made.operation, m.Touch(parent.number, now, now)]
        assert inode.xattrs is not None
        if default and not acl.is_minimal(access):
            operations.append(set_xattr(inode, acl.ACCESS, acl.encode(access)))
            inode.xattrs[acl.ACCESS] = acl.encode(access)
        if default and kind is Kind.DIRECTORY:
            operations.append(set_xattr(inode, acl.DEFAULT, acl.encode(default)))
            inode.xattrs[acl.DEFAULT] = acl.encode(default)
        inode.seal = made.operation.inode.seal
        # Known before it has a name: who finds the name meanwhile finds this inode.
        self._volume.inodes[inode.number] = inode
        try:
            await self._decide([(parent, name, made.dentry)], [parent], *operations)
        except BaseException:
            del self._volume.inodes[inode.number]
            raise
        parent.mtime_ns = parent.ctime_ns = now
        parent.nlink += kind is Kind.DIRECTORY
        return inode

    async def link(self, number: int, parent_number: int, name: bytes) -> Inode:
        """See FileSystem."""
        inode = await self._directories.fresh(number)
        parent = await self._directories.fresh_directory(parent_number)
        if inode.is_directory:
            raise FsError(errno.EPERM)
        await self.flush(inode)
        await self._directories.learn(parent, name)
        if name in parent.children:
            raise FsError(errno.EEXIST)
        now, dentry_id = self._volume.runtime.now_ns(), self._volume.new_number()
        encrypted, wrapped = building.wrap(self._volume, parent, name, inode)
        await self._decide(
            [(parent, name, Dentry(dentry_id, name, number, inode.kind))],
            [parent, inode],
            m.Link(parent_number, encrypted, dentry_id, wrapped, number),
            m.Touch(number, None, now),
            m.Touch(parent_number, now, now),
        )
        inode.nlink += 1
        inode.ctime_ns = parent.mtime_ns = parent.ctime_ns = now
        return inode

    async def unlink(self, parent_number: int, name: bytes) -> None:
        """See FileSystem."""
        await retried(lambda: self._remove(parent_number, name, of_directory=False))

    async def rmdir(self, parent_number: int, name: bytes) -> None:
        """See FileSystem."""
        await retried(lambda: self._remove(parent_number, name, of_directory=True))

    async def _remove(self, parent_number: int, name: bytes, *, of_directory: bool) -> None:
        parent = await self._directories.fresh_directory(parent_number)
        await self._directories.learn(parent, name)
        _, inode = self._directories.child(parent, name)
        if inode.is_directory and not of_directory:
            raise FsError(errno.EISDIR)
        if of_directory and not inode.is_directory:
            raise FsError(errno.ENOTDIR)
        now = self._volume.runtime.now_ns()
        is_quiet = await self._decide(
            [(parent, name, None)],
            [parent, inode],
            m.Unlink(parent.number, parent.key.encrypt_name(name), inode.number),
            m.Touch(parent.number, now, now),
            m.Touch(inode.number, None, now),
        )
        parent.mtime_ns = parent.ctime_ns = now
        parent.nlink -= of_directory
        self._lose_name(inode, now, is_quiet=is_quiet)

    def _lose_name(self, inode: Inode, now: int, *, is_quiet: bool) -> None:
        inode.ctime_ns = now
        inode.nlink = 0 if inode.is_directory else max(0, inode.nlink - 1)
        # Counted wrongly it would be given up too early: then it is loaded again first.
        if is_quiet and not inode.is_stale and inode.nlink == 0 and not inode.is_in_use:
            self._volume.reap(inode)

    async def rename(
        self, parent_number: int, name: bytes, new_parent_number: int, new_name: bytes, flags: int
    ) -> None:
        """See FileSystem."""
        if flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            raise FsError(errno.EINVAL)
        exchange = flags == RENAME_EXCHANGE
        place = (parent_number, name, new_parent_number, new_name)
        if exchange:
            await retried(lambda: self._exchange(*place))
        else:
            await retried(lambda: self._move(*place, may_replace=flags == 0))

    async def _move(
        self,
        parent_number: int,
        name: bytes,
        new_parent_number: int,
        new_name: bytes,
        *,
        may_replace: bool,
    ) -> None:
        parent = await self._directories.fresh_directory(parent_number)
        new_parent = await self._directories.fresh_directory(new_parent_number)
        await self._directories.learn(parent, name)
        await self._directories.learn(new_parent, new_name)
        dentry, inode = self._directories.child(parent, name)
        self._directories.require_known(new_parent, new_name)
        replaced = new_parent.children.get(new_name)
        if replaced is not None and not may_replace:
            raise FsError(errno.EEXIST)
        if replaced is not None and replaced.child == inode.number:
            return
        other = self._volume.get(replaced.child) if replaced is not None else None
        await self.flush(inode)
        now, dentry_id = self._volume.runtime.now_ns(), self._volume.new_number()
        encrypted, wrapped = building.wrap(self._volume, new_parent, new_name, inode)
        operations: list[m.Operation] = [
            m.Rename(
                parent.number, parent.key.encrypt_name(name), inode.number,
                new_parent.number, encrypted, dentry_id, wrapped, other.number if other else 0,
            ),
            m.Touch(parent.number, now, now),
            m.Touch(new_parent.number, now, now),
            m.Touch(inode.number, None, now),
        ]  # fmt: skip
        if other is not None:
            operations.append(m.Touch(other.number, None, now))
        touched = [parent, new_parent, inode, *([other] if other is not None else [])]
        moved = Dentry(dentry_id, new_name, inode.number, dentry.kind)
        names: list[Name] = [(parent, name, None), (new_parent, new_name, moved)]
        try:
            is_quiet = await self._decide(names, touched, *operations)
        except FsError as error:
            if error.errno == errno.EEXIST and may_replace:
                raise PreconditionFailed("the new name is taken, and was not before") from error
            raise
        for changed in (parent, new_parent):
            changed.mtime_ns = changed.ctime_ns = now
        inode.ctime_ns = now
        if inode.is_directory:
            parent.nlink -= 1
            new_parent.nlink += 1
            inode.parent = new_parent.number
        if other is not None:
            new_parent.nlink -= other.is_directory
            self._lose_name(other, now, is_quiet=is_quiet)

    async def _exchange(
        self, parent_number: int, name: bytes, new_parent_number: int, new_name: bytes
    ) -> None:
        parent = await self._directories.fresh_directory(parent_number)
        new_parent = await self._directories.fresh_directory(new_parent_number)
        await self._directories.learn(parent, name)
        await self._directories.learn(new_parent, new_name)
        dentry, inode = self._directories.child(parent, name)
        other_dentry, other = self._directories.child(new_parent, new_name)
        if other is inode:
            return
        now = self._volume.runtime.now_ns()
        there, wrapped = building.wrap(self._volume, new_parent, new_name, inode)
        here, other_wrapped = building.wrap(self._volume, parent, name, other)
        here_now = Dentry(dentry.dentry_id, name, other.number, other.kind)
        there_now = Dentry(other_dentry.dentry_id, new_name, inode.number, inode.kind)
        names: list[Name] = [(parent, name, here_now), (new_parent, new_name, there_now)]
        touched = [parent, new_parent, inode, other]
        await self._decide(
            names,
            touched,
            m.Exchange(
                parent.number, here, inode.number, new_parent.number, there, other.number,
                wrapped, other_wrapped,
            ),
            m.Touch(parent.number, now, now),
            m.Touch(new_parent.number, now, now),
            m.Touch(inode.number, None, now),
            m.Touch(other.number, None, now),
        )  # fmt: skip
        inode.parent, other.parent = new_parent.number, parent.number
        for changed in touched:
            changed.is_stale = True  # times and, of the directories, links

    async def set_attributes(self, number: int, changes: Changes) -> Inode:
        """See FileSystem; a new size is committed before this returns."""
        if changes.size is not None:
            inode = await self._directories.fresh(number)
            building.check_size(inode, changes.size)
            self._volume.truncate(inode, changes.size, self._volume.runtime.now_ns())
            await self.flush(inode)
        return await retried(lambda: self._set_attributes(number, changes))

    async def _set_attributes(self, number: int, changes: Changes) -> Inode:
        inode = await self._directories.fresh(number)
        now = self._volume.runtime.now_ns()
        access: acl.Acl = ()
        if changes.mode is not None:
            access = await self._xattrs.acl_of(number, acl.ACCESS)
        attributes = building.changed_attributes(inode, changes, now)
        operation = building.set_attributes(self._volume, inode, attributes)
        operations: list[m.Operation] = [operation]
        if access:
            value = acl.encode(acl.with_mode(access, attributes.mode))
            operations.append(set_xattr(inode, acl.ACCESS, value))
            inode.xattrs = None
        await decide_attributes(self._volume, self._direct, inode, operation, operations)
        return inode

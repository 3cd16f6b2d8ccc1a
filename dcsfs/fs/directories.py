"""Names: what is known of directories in memory, and how it gets there.

A mount that holds the lease knows for good what it has learned. A shared one knows it as long as
the satellite vouches for it (`Volume.is_trusted`); what others change is forgotten name by name. A
read-only one asks again.
"""

import errno

from dcsfs import keys
from dcsfs.fs import loader
from dcsfs.fs.errors import FsError
from dcsfs.fs.state import Dentry, Inode
from dcsfs.fs.volume import Volume
from network import messages as m
from network.errors import NotFound

LOOKUPS_BEFORE_LISTING = 2
"""A directory in use is listed whole: further names, and new ones, then need no satellite."""
TRIES_MAX = 5
"""Answers that a change by others has overtaken; then the last one is used and not kept."""


class Directories:
    """The directories of one volume."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume

    def get(self, number: int) -> Inode:
        """A directory that still has a name; ENOTDIR, ENOENT."""
        inode = self._volume.get(number)
        if not inode.is_directory:
            raise FsError(errno.ENOTDIR)
        if inode.nlink == 0:
            raise FsError(errno.ENOENT)
        return inode

    async def fresh(self, number: int) -> Inode:
        """An inode as it is now; from memory, without a checkpoint, where that is known."""
        inode = self._volume.get(number)
        if inode.is_stale or (self._volume.is_shared and not self._volume.is_trusted):
            await self._refresh(inode)
        return inode

    async def fresh_directory(self, number: int) -> Inode:
        """As `fresh`; ENOTDIR, ENOENT."""
        await self.fresh(number)
        return self.get(number)

    async def _refresh(self, inode: Inode) -> None:
        volume = self._volume
        request = m.InodeRequest(volume.client.api_key, volume.client.bucket, inode.number)
        for _ in range(TRIES_MAX):
            seen = volume.events_seen
            try:
                record = await volume.client.call(m.GET_INODE, request)
            except NotFound:
                inode.nlink, inode.is_stale = 0, False
                return
            fresh = loader.inode_from(volume.client, record, inode.key, inode.parent)
            volume.follow(inode, fresh)
            if volume.events_seen == seen:
                inode.is_stale = False
                return

    async def learn(self, parent: Inode, name: bytes) -> None:
        """Have a name's presence or absence in memory, and its inode as it is now."""
        keys.check_name(name)
        volume = self._volume
        if not volume.is_trusted:
            volume.forget_name(parent, name)  # another mount may have changed it
        elif self._is_known(parent, name):
            dentry = parent.children.get(name)
            if dentry is None:
                return
            if dentry.child in volume.inodes:
                await self.fresh(dentry.child)
                return
        if volume.is_trusted and not parent.is_complete:
            parent.lookups_sent += 1
            if parent.lookups_sent > LOOKUPS_BEFORE_LISTING:
                await self.complete(parent)
                return
        for _ in range(TRIES_MAX):
            if await self._look_up(parent, name):
                return

    @staticmethod
    def _is_known(parent: Inode, name: bytes) -> bool:
        if name in parent.children or name in parent.absent:
            return True
        return parent.is_complete and name not in parent.unknown

    async def _look_up(self, parent: Inode, name: bytes) -> bool:
        """Ask for one name; False if others have changed names meanwhile."""
        volume = self._volume
        seen, changes = volume.events_seen, parent.name_changes
        found = await loader.lookup(volume.client, parent, name)
        is_current = parent.name_changes == changes
        if not volume.is_shared and not volume.is_read_only and name in parent.absent:
            return True  # removed here meanwhile
        if is_current:
            parent.unknown.discard(name)
        if found is None:
            if name not in parent.children:
                parent.absent.add(name)
            return is_current
        dentry, inode = found
        self._adopt(inode, seen)
        parent.children.setdefault(name, dentry)
        parent.absent.discard(name)
        if not is_current:
            parent.unknown.add(name)
        return is_current

    def _adopt(self, inode: Inode, seen: int) -> None:
        """Keep a loaded inode; stale from the start if others changed anything meanwhile."""
        adopted = self._volume.adopt(inode)
        if self._volume.is_shared:
            adopted.is_stale = self._volume.events_seen != seen

    def child(self, parent: Inode, name: bytes) -> tuple[Dentry, Inode]:
        """A name that has been learned; ENOENT."""
        dentry = parent.children.get(name)
        if dentry is None:
            raise FsError(errno.ENOENT)
        return dentry, self._volume.get(dentry.child)

    async def lookup(self, parent_number: int, name: bytes) -> Inode:
        """Find a name; ENOENT."""
        parent = self.get(parent_number)
        if name == b".":
            return await self.fresh(parent_number)
        if name == b"..":
            return await self.fresh(parent.parent)
        await self.learn(parent, name)
        return self.child(parent, name)[1]

    async def complete(self, directory: Inode) -> None:
        """Have all entries of a directory in memory."""
        for _ in range(TRIES_MAX):
            if directory.is_complete and self._volume.is_trusted:
                for name in list(directory.unknown)[:TRIES_MAX]:
                    await self._look_up(directory, name)
                if not directory.unknown:
                    return
            if await self._list(directory):
                return

    async def _list(self, directory: Inode) -> bool:
        """List the directory; False if others have changed names meanwhile."""
        volume = self._volume
        seen, changes = volume.events_seen, directory.name_changes
        found = await loader.list_directory(volume.client, directory)
        is_current = directory.name_changes == changes
        if volume.is_read_only or volume.is_shared:
            volume.forget_names(directory)
        for dentry, inode in found:
            if dentry.name in directory.absent:
                continue
            self._adopt(inode, seen)
            directory.children.setdefault(dentry.name, dentry)
        directory.is_complete = is_current
        return is_current

    async def read(self, number: int) -> list[Dentry]:
        """All entries in dentry id order; the id is the cookie."""
        directory = await self.fresh(number)
        if not directory.is_directory:
            raise FsError(errno.ENOTDIR)
        if directory.nlink:
            await self.complete(directory)
        return sorted(directory.children.values(), key=lambda item: item.dentry_id)

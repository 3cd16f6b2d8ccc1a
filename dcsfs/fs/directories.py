"""Names: what is known of directories in memory, and how it gets there.

A writable mount knows for good what it has learned, because nobody else can change the bucket; a
read-only one asks again.
"""

import errno

from dcsfs import keys
from dcsfs.fs import loader
from dcsfs.fs.errors import FsError
from dcsfs.fs.state import Dentry, Inode
from dcsfs.fs.volume import Volume

LOOKUPS_BEFORE_LISTING = 2
"""A directory in use is listed whole: further names, and new ones, then need no satellite."""

_CLEAN_FIELDS = (
    "nlink", "mode", "uid", "gid", "atime_ns", "mtime_ns", "ctime_ns", "size",
    "content_version", "committed_size", "allocated", "seal", "symlink",
)  # fmt: skip


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

    async def learn(self, parent: Inode, name: bytes) -> None:
        """Have a name's presence or absence in memory."""
        keys.check_name(name)
        if self._volume.is_read_only:
            parent.children.pop(name, None)  # another mount may have changed it
        elif name in parent.children or name in parent.absent or parent.is_complete:
            dentry = parent.children.get(name)
            if dentry is None or dentry.child in self._volume.inodes:
                return
        if not self._volume.is_read_only:
            parent.lookups_sent += 1
            if parent.lookups_sent > LOOKUPS_BEFORE_LISTING:
                await self.complete(parent)
                return
        found = await loader.lookup(self._volume.client, parent, name)
        if not self._volume.is_read_only and (name in parent.absent):
            return  # removed here meanwhile
        if found is None:
            if name not in parent.children:
                parent.absent.add(name)
            return
        dentry, inode = found
        if self._volume.is_read_only:
            self._refresh_clean(inode)
        self._volume.adopt(inode)
        parent.children.setdefault(name, dentry)
        parent.absent.discard(name)

    def _refresh_clean(self, fresh: Inode) -> None:
        """On a read-only mount the satellite's record replaces what is in memory."""
        known = self._volume.inodes.get(fresh.number)
        if known is None:
            return
        if known.content_version != fresh.content_version:
            known.rows, known.placements = fresh.rows, {}
        if known.ctime_ns != fresh.ctime_ns:  # attributes may be others: ask again when needed
            known.xattrs, known.xattr_count = fresh.xattrs, fresh.xattr_count
        for name in _CLEAN_FIELDS:
            setattr(known, name, getattr(fresh, name))

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
            return parent
        if name == b"..":
            return self._volume.get(parent.parent)
        await self.learn(parent, name)
        return self.child(parent, name)[1]

    async def complete(self, directory: Inode) -> None:
        """Have all entries of a directory in memory."""
        if directory.is_complete and not self._volume.is_read_only:
            return
        found = await loader.list_directory(self._volume.client, directory)
        if self._volume.is_read_only:
            directory.children.clear()
        for dentry, inode in found:
            if dentry.name in directory.absent:
                continue
            if self._volume.is_read_only:
                self._refresh_clean(inode)
            self._volume.adopt(inode)
            directory.children.setdefault(dentry.name, dentry)
        directory.is_complete = True

    async def read(self, number: int) -> list[Dentry]:
        """All entries in dentry id order; the id is the cookie."""
        directory = self._volume.get(number)
        if not directory.is_directory:
            raise FsError(errno.ENOTDIR)
        if directory.nlink:
            await self.complete(directory)
        return sorted(directory.children.values(), key=lambda item: item.dentry_id)

"""Names: what is known of directories in memory, and how it gets there.

A mount that holds the lease knows for good what it has learned. A shared one knows it as long as
the satellite vouches for it (`Volume.is_trusted`); what others change is forgotten name by name. A
read-only one asks again.
"""

import errno
from bisect import bisect_right
from collections.abc import Sequence

from dcsfs import keys
from dcsfs.fs import loader
from dcsfs.fs.direct import retried
from dcsfs.fs.errors import FsError
from dcsfs.fs.state import Dentry, Inode
from dcsfs.fs.volume import Volume
from network import messages as m
from network.errors import NotFound, PreconditionFailed
from network.limits import FILE_BYTES_MAX, LIST_PAGE_ENTRIES_MAX

LOOKUPS_BEFORE_LISTING = 2
"""A directory in use is listed whole: further names, and new ones, then need no satellite."""
TRIES_MAX = 5
"""Answers that a change by others has overtaken; then the last one is used and not kept."""
LISTED_ENTRIES_MAX = 65_536
"""A directory with more is not listed whole: 100 bytes and more for each name."""
PAGE_ENTRIES = 1024
"""Entries looked at for one request of the kernel: more than fit in its answer."""


class Directories:
    """The directories of one volume."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume

    @property
    def next_number(self) -> int:
        """Dentries and inodes that this mount makes from now on have this number or a later one."""
        return 0 if self._volume.is_read_only else self._volume.session.next_number

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
            if volume.has(dentry.child):
                await self.fresh(dentry.child)
                return
        if volume.is_trusted and not parent.is_complete and not parent.is_large:
            parent.lookups_sent += 1
            if parent.lookups_sent > LOOKUPS_BEFORE_LISTING:
                await self.complete(parent)
                if self._is_known(parent, name):
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

    def is_at_hand(self, parent: Inode, name: bytes) -> bool:
        """Whether a name's absence, or its presence and inode, are in memory."""
        dentry = parent.children.get(name)
        if dentry is not None:
            return self._volume.has(dentry.child)
        return self._is_known(parent, name)

    def child_in_memory(self, parent: Inode, name: bytes) -> Inode | None:
        """The inode of a name as it is in memory; None if there is none."""
        dentry = parent.children.get(name)
        return self._volume.get(dentry.child) if dentry is not None else None

    def child(self, parent: Inode, name: bytes) -> tuple[Dentry, Inode]:
        """A name that has been learned; ENOENT, PreconditionFailed as `require_known`."""
        dentry = parent.children.get(name)
        if dentry is None:
            self.require_known(parent, name)
            raise FsError(errno.ENOENT)
        return dentry, self._volume.get(dentry.child)

    def require_known(self, parent: Inode, name: bytes) -> None:
        """PreconditionFailed if a name that was learned has had to be forgotten since.

        Others may have changed it, or all was forgotten, while something else was waited for.
        """
        if not self._is_known(parent, name):
            raise PreconditionFailed("what was known of a name has become old")

    async def lookup(self, parent_number: int, name: bytes) -> Inode:
        """Find a name; ENOENT."""
        if name == b".":
            return await self.fresh(parent_number)
        parent = self.get(parent_number)
        if name == b"..":
            return await self.fresh(parent.parent)

        async def find() -> Inode:
            await self.learn(parent, name)
            return self.child(parent, name)[1]

        return await retried(find)

    async def complete(self, directory: Inode) -> None:
        """Have all entries of a directory in memory, unless it is large."""
        for _ in range(TRIES_MAX):
            if directory.is_large:
                return
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
        found: list[tuple[Dentry, Inode]] = []
        after, more = 0, True
        while more:
            page, more = await self._page(directory, after, LIST_PAGE_ENTRIES_MAX)
            found += page
            if more and len(found) >= LISTED_ENTRIES_MAX:
                directory.is_large = True
                return True
            after = found[-1][0].dentry_id if found else 0
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

    async def _page(
        self, directory: Inode, after: int, limit: int
    ) -> tuple[list[tuple[Dentry, Inode]], bool]:
        return await loader.list_page(self._volume.client, directory, after, limit)

    async def is_empty(self, directory: Inode) -> bool:
        """Whether a directory has no entries; sure until the next checkpoint."""
        await self.complete(directory)
        after, more = 0, directory.is_large
        while more and not directory.children:
            page, more = await self._page(directory, after, LIST_PAGE_ENTRIES_MAX)
            if any(dentry.name not in directory.absent for dentry, _ in page):
                return False
            after = page[-1][0].dentry_id if page else 0
        return not directory.children

    async def page_of(self, directory: Inode, after: int) -> tuple[list[Dentry], int]:
        """Entries of a large directory after a dentry id, and how far they reach.

        At the end that is FILE_BYTES_MAX. Changes made here and not committed are part of it.
        """
        volume = self._volume
        seen = volume.events_seen
        page, more = await self._page(directory, after, PAGE_ENTRIES)
        end = page[-1][0].dentry_id if more else FILE_BYTES_MAX
        found: dict[int, Dentry] = {}
        is_ours = directory.number in volume.pending_inodes() and not volume.is_shared
        if is_ours:
            found = {
                dentry.dentry_id: dentry
                for dentry in directory.children.values()
                if after < dentry.dentry_id <= end
            }
        for dentry, inode in page:
            known = directory.children.get(dentry.name, dentry)
            if is_ours and (dentry.name in directory.absent or known.dentry_id != dentry.dentry_id):
                continue  # removed or moved here
            self._adopt(inode, seen)
            directory.children.setdefault(dentry.name, dentry)
            found[dentry.dentry_id] = dentry
        return [found[number] for number in sorted(found)], end

    async def load_children(self, directory: Inode, dentries: Sequence[Dentry]) -> None:
        """Have the inodes of these consecutive entries in memory, as far as they still exist."""
        volume = self._volume
        missing = [d for d in dentries if not volume.has(d.child)]
        while missing:
            seen = volume.events_seen
            page, more = await self._page(
                directory, missing[0].dentry_id - 1, LIST_PAGE_ENTRIES_MAX
            )
            for _, inode in page:
                if not volume.has(inode.number):
                    self._adopt(inode, seen)
            end = page[-1][0].dentry_id if more else FILE_BYTES_MAX
            missing = [d for d in missing if d.dentry_id > end and not volume.has(d.child)]

    async def read(self, number: int) -> list[Dentry]:
        """All entries in dentry id order, with their inodes in memory; ENOTDIR.

        For directories of any size; a program that reads page by page is given a `Scan`.
        """
        scan = Scan(self, number)
        found: list[Dentry] = []
        after, page = 0, await scan.after(0)
        while page:
            found += [
                Dentry(cookie, name, inode.number, inode.kind) for cookie, name, inode in page
            ]
            after = found[-1].dentry_id
            page = await scan.after(after)
        return found

    async def list_all(self, number: int) -> list[Dentry] | None:
        """All entries in dentry id order from memory; None for a large directory. ENOTDIR."""
        directory = await self.fresh(number)
        if not directory.is_directory:
            raise FsError(errno.ENOTDIR)
        if directory.nlink:
            await self.complete(directory)
        if directory.is_large:
            return None
        return sorted(directory.children.values(), key=lambda item: item.dentry_id)


class Scan:
    """One open directory being read from cookie to cookie; the cookie is the dentry id.

    Each name that is there from the first page to the last is shown exactly once, also when its
    file is replaced meanwhile; removed ones are not shown any more. A file that gets another name
    before it is shown comes at the end. What is made meanwhile is not shown, nor is what was
    shown already shown under another name: a program that renames or makes a file for each that
    it reads would never come to an end.
    """

    def __init__(self, directories: Directories, number: int) -> None:
        self._directories = directories
        self.number = number
        self._entries: list[Dentry] | None = None
        self._names: set[bytes] = set()
        self._offered: list[tuple[int, bytes, Inode]] = []
        self._shown: set[int] = set()
        self._has_begun = False
        self._began_at = 0

    async def after(self, cookie: int) -> list[tuple[int, bytes, Inode]]:
        """(cookie, name, inode) of the entries after a cookie, about a page; empty at the end.

        The inodes are in memory until the next checkpoint. Raises what loading them raises.
        """
        if cookie == 0 or not self._has_begun:
            self._began_at = self._directories.next_number
            self._names, self._shown, self._offered = set(), set(), []
            self._entries = await self._directories.list_all(self.number)
            self._has_begun = True
        self._shown.update(inode.number for taken, _, inode in self._offered if taken <= cookie)
        while True:
            if self._entries is None:
                page, end = await self._page_of_large(cookie)
            else:
                page, end = await self._page_of_listed(self._entries, cookie)
            found = await self._resolve(page)
            self._offered = found if self._entries is not None else []
            if found or (not page and end == FILE_BYTES_MAX):
                return found
            cookie = end if end < FILE_BYTES_MAX else page[-1].dentry_id

    async def _page_of_large(self, cookie: int) -> tuple[list[Dentry], int]:
        directory = await self._directories.fresh(self.number)
        page, end = await self._directories.page_of(directory, cookie)
        return [e for e in page if not self._is_made_since(e.dentry_id)], end

    def _is_made_since(self, number: int) -> bool:
        """Whether this mount has given out a number since the scan began."""
        return self._began_at <= number < self._directories.next_number

    async def _page_of_listed(self, entries: list[Dentry], cookie: int) -> tuple[list[Dentry], int]:
        first = bisect_right(entries, cookie, key=lambda item: item.dentry_id)
        page = entries[first : first + PAGE_ENTRIES]
        if page:
            return page, page[-1].dentry_id
        # What has other names since; a name that was shown already has another file now.
        now = await self._directories.list_all(self.number) or []
        self._names = self._names or {entry.name for entry in entries}
        added = [
            e
            for e in now
            if e.dentry_id > cookie
            and e.name not in self._names
            and e.child not in self._shown
            and not self._is_made_since(e.child)
        ]
        self._names.update(entry.name for entry in added)
        entries += added
        return added[:PAGE_ENTRIES], FILE_BYTES_MAX

    async def _resolve(self, page: list[Dentry]) -> list[tuple[int, bytes, Inode]]:
        """What the names stand for now, without those that are gone."""
        directories = self._directories
        directory = await directories.fresh(self.number)
        await directories.load_children(directory, page)
        for entry in page:
            if not directories.is_at_hand(directory, entry.name):
                await directories.learn(directory, entry.name)
        found = []
        for entry in page:
            inode = directories.child_in_memory(directory, entry.name)
            if inode is not None:
                found.append((entry.dentry_id, entry.name, inode))
        return found

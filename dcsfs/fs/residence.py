"""Which inodes are in memory: those in use, those the satellite does not have yet, and some more.

The kernel may know millions of inodes. One that has not been asked for lately, and that the
satellite has as it is, is evicted when there are too many: what stays is the number of references
the kernel holds (`Volume.parted`). It is loaded again by its number, which is also how an NFS
server finds a file from the handle a client has kept.
"""

import errno
from collections import Counter
from collections.abc import Callable

from dcsfs.fs import loader
from dcsfs.fs.errors import FsError
from dcsfs.fs.state import Inode
from dcsfs.fs.volume import Volume
from network.errors import NotFound

INODES_KEPT_MAX = 65_536
"""About 150 MB, at 1 to 2.5 KB each. The kernel has its own, beside."""
SWEEP_INTERVAL_S = 10.0


class Residence:
    """Evicts and recalls one volume's inodes."""

    def __init__(self, volume: Volume, mounted_root: Callable[[], Inode]) -> None:
        self._volume = volume
        self._mounted_root = mounted_root
        self._running: Counter[int] = Counter()
        self.limit = INODES_KEPT_MAX
        self.evicted = 0

    def begin(self) -> int:
        """Nothing that is asked for from here on is evicted before `end` is given this number.

        Every operation that counts on an inode across a checkpoint stands between the two.
        """
        began = self._volume.sweeps
        self._running[began] += 1
        return began

    def end(self, began: int) -> None:
        """See `begin`."""
        self._running[began] -= 1
        if not self._running[began]:
            del self._running[began]

    def sweep(self) -> int:
        """Evict what has been idle since the last sweep, oldest first, if there is too much.

        Returns how many. No checkpoint.
        """
        volume = self._volume
        volume.sweeps += 1
        excess = len(volume.inodes) - self.limit
        if excess <= 0:
            return 0
        before = min(self._running, default=volume.sweeps - 1)
        pending = volume.pending_inodes()
        idle = [
            inode
            for inode in volume.inodes.values()
            if inode.used < before and inode.number not in pending and self._is_idle(inode)
        ]
        idle.sort(key=lambda inode: inode.used)
        chosen = idle[: excess + self.limit // 8]
        for inode in chosen:
            del volume.inodes[inode.number]
            if inode.lookup_count > 0:
                volume.parted[inode.number] = inode.lookup_count
        self.evicted += len(chosen)
        return len(chosen)

    def _is_idle(self, inode: Inode) -> bool:
        """Whether the satellite has all there is to know of an inode, and can find it by number.

        A directory that the kernel knows stays: it may know names in it, too, and those are
        needed to have it forget them.
        """
        if inode is self._volume.root or inode is self._mounted_root() or inode.is_stub:
            return False
        if inode.open_count or inode.layers:
            return False
        if inode.nlink == 0 or not inode.seal:
            return False
        return not (inode.is_directory and inode.lookup_count > 0)

    async def recall(self, number: int) -> None:
        """Have an inode in memory; ESTALE if it has no name any more, or not below what is mounted.

        If cancelled, some directories above it may have been loaded.
        """
        inode = await self._load(number)
        root = self._mounted_root()
        while root is not self._volume.root and inode is not root:
            if inode is self._volume.root:
                raise FsError(errno.ESTALE, f"inode {number} is not below what is mounted")
            inode = await self._load(inode.parent)

    def _known(self, number: int) -> Inode | None:
        inode = self._volume.inodes.get(number)
        return None if inode is None or inode.is_stub else inode

    async def _load(self, number: int) -> Inode:
        volume = self._volume
        seen = volume.events_seen
        try:
            path = await loader.find_path(volume.client, number, self._known)
        except NotFound as error:
            raise FsError(errno.ESTALE, f"inode {number} is gone") from error
        for inode in path:
            adopted = volume.adopt(inode)
            if volume.is_shared:
                adopted.is_stale = volume.events_seen != seen
        return volume.get(number)

    def forget(self, number: int, count: int) -> None:
        """The kernel drops `count` references to an inode that is not in memory."""
        left = self._volume.parted.get(number, 0) - count
        if left > 0:
            self._volume.parted[number] = left
        else:
            self._volume.parted.pop(number, None)

"""Tell the kernel to forget: what another mount has changed, or everything.

The calls block while the kernel waits for us about the same page or directory, so they run in a
thread of their own, and whoever waits for them does so with a deadline.
"""

import logging
from collections.abc import Callable, Sequence

import pyfuse3
import trio

from dcsfs.fs.filesystem import FileSystem
from dcsfs.fuse.operations import FUSE_ROOT

log = logging.getLogger(__name__)


class FuseKernelCaches:
    """KernelCaches of a mounted file system."""

    def __init__(self, filesystem: FileSystem) -> None:
        self._fs = filesystem
        self._limiter = trio.CapacityLimiter(4)

    def _kernel_number(self, number: int) -> pyfuse3.InodeT:
        return pyfuse3.InodeT(FUSE_ROOT if number == self._fs.root.number else number)

    def _known(self, number: int) -> bool:
        inode = self._fs.volume.inodes.get(number)
        is_root = number == self._fs.root.number
        return is_root or (inode is not None and inode.lookup_count > 0)

    async def _run(self, calls: list[Callable[[], None]]) -> None:
        def run() -> None:
            for call in calls:
                try:
                    call()
                except OSError as error:
                    log.debug("the kernel had nothing to forget: %s", error)

        if calls:
            await trio.to_thread.run_sync(run, limiter=self._limiter, abandon_on_cancel=True)

    def _forget_inode(self, number: int) -> Callable[[], None]:
        inode = self._kernel_number(number)
        return lambda: pyfuse3.invalidate_inode(inode, attr_only=False)

    def _forget_entry(self, parent: int, name: bytes) -> Callable[[], None]:
        inode = self._kernel_number(parent)
        return lambda: pyfuse3.invalidate_entry(inode, pyfuse3.FileNameT(name))

    async def drop(self, numbers: Sequence[int]) -> None:
        """See KernelCaches."""
        await self._run([self._forget_inode(n) for n in dict.fromkeys(numbers) if self._known(n)])

    async def drop_all(self) -> None:
        """See KernelCaches."""
        inodes = self._fs.volume.inodes
        calls = [self._forget_inode(number) for number in list(inodes) if self._known(number)]
        calls += [
            self._forget_entry(directory.number, dentry.name)
            for directory in list(inodes.values())
            for dentry in directory.children.values()
            if self._known(dentry.child)
        ]
        await self._run(calls)

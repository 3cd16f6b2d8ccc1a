"""Tell the kernel to forget: what another mount has changed, or everything.

The calls block while the kernel waits for us about the same page or directory, so they run in a
thread of their own, and whoever waits for them does so with a deadline.
"""

import logging
import os
import struct
from collections.abc import Callable, Sequence

import pyfuse3
import trio

from dcsfs.fs.filesystem import FileSystem
from dcsfs.fs.state import Dentry
from dcsfs.fuse.operations import CAN_EXPIRE_NAMES, DIRECTORY_NAME_TIMEOUT_S, kernel_number
from network.messages import Kind

log = logging.getLogger(__name__)

_OUT_HEADER = struct.Struct("=IiQ")
"""struct fuse_out_header: length, notification code (3: INVAL_ENTRY), 0 for a notification."""
_INVAL_ENTRY = struct.Struct("=QII")
"""struct fuse_notify_inval_entry_out: parent, length of the name without its 0, flags."""
_EXPIRE_ONLY = 1
"""FUSE_EXPIRE_ONLY of linux/fuse.h, protocol 7.38: libfuse has a call for it, pyfuse3 has not."""


class FuseKernelCaches:
    """KernelCaches of a mounted file system."""

    def __init__(self, filesystem: FileSystem, descriptor: int) -> None:
        """`descriptor` is the session's /dev/fuse."""
        self._fs = filesystem
        self._descriptor = descriptor
        self._limiter = trio.CapacityLimiter(4)

    def _known(self, number: int) -> bool:
        inode = self._fs.volume.inodes.get(number)
        is_root = number == self._fs.root.number
        is_held = inode is not None and inode.lookup_count > 0
        return is_root or is_held or number in self._fs.volume.parted

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
        inode = kernel_number(self._fs, number)
        return lambda: pyfuse3.invalidate_inode(inode, attr_only=False)

    def _expire_entry(self, parent: int, dentry: Dentry) -> Callable[[], None]:
        """Have the kernel ask for a name again when it is next used."""
        inode = kernel_number(self._fs, parent)
        if CAN_EXPIRE_NAMES:
            return lambda: self._notify_expiry(inode, dentry.name)
        return lambda: pyfuse3.invalidate_entry(inode, pyfuse3.FileNameT(dentry.name))

    def _notify_expiry(self, parent: int, name: bytes) -> None:
        """Raises OSError: ENOENT if the kernel does not know the name."""
        body = _INVAL_ENTRY.pack(parent, len(name), _EXPIRE_ONLY) + name + b"\0"
        os.write(self._descriptor, _OUT_HEADER.pack(_OUT_HEADER.size + len(body), 3, 0) + body)

    async def drop(self, numbers: Sequence[int]) -> None:
        """See KernelCaches."""
        await self._run([self._forget_inode(n) for n in dict.fromkeys(numbers) if self._known(n)])

    async def drop_all(self, *, then: Callable[[], None]) -> None:
        """See KernelCaches."""
        inodes = self._fs.volume.inodes
        numbers = [*inodes, *self._fs.volume.parted]
        calls = [self._forget_inode(number) for number in numbers if self._known(number)]
        calls += [
            self._expire_entry(directory.number, dentry)
            for directory in list(inodes.values())
            for dentry in directory.children.values()
            if self._known(dentry.child) and (CAN_EXPIRE_NAMES or not _is_directory(dentry))
        ]
        then()
        await self._run(calls)
        if not CAN_EXPIRE_NAMES:
            await trio.sleep(DIRECTORY_NAME_TIMEOUT_S)


def _is_directory(dentry: Dentry) -> bool:
    return dentry.kind is Kind.DIRECTORY

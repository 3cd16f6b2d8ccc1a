"""Files that must survive power loss, and the lock that keeps a directory to one process."""

import ctypes
import fcntl
import os
import socket
from pathlib import Path

from network.errors import InvalidArgument

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def write_durably(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a file: write aside, fsync, rename, fsync the directory. Blocking."""
    temporary = path.with_name(path.name + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the directory's entries durable. Blocking."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def punch_hole(descriptor: int, offset: int, length: int) -> None:
    """Give a range of a file back to the disk; a file system that cannot is not an error."""
    _libc.fallocate(descriptor, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, offset, length)


def write_fully(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """pwrite all of `data`; raises OSError, ENOSPC among them."""
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


class DirectoryLock:
    """An exclusive lock on a directory for the life of the process that took it."""

    def __init__(self, directory: Path, what: str) -> None:
        """Take the lock; raises InvalidArgument naming pid and host of who has it."""
        path = directory / "lock"
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._descriptor, 300, 0).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise InvalidArgument(
                f"{what} {directory} is in use by process {holder or 'unknown'}"
            ) from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()} on host {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Give the directory free."""
        os.close(self._descriptor)


def open_direct(path: Path) -> int | None:
    """A descriptor for aligned writes past the page cache; None where there is no such thing."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return None

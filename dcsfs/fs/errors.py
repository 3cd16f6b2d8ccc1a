"""One table from errors to errno, and the error that the semantics raise themselves."""

import errno
import os

from network import errors as e


class FsError(Exception):
    """An operation's errno, for the kernel."""

    def __init__(self, code: int, detail: str = "") -> None:
        super().__init__(f"{os.strerror(code)}: {detail}" if detail else os.strerror(code))
        self.errno = code


class NotInMemory(FsError):
    """ESTALE for an inode that may exist: it can be loaded again by its number."""

    def __init__(self, number: int) -> None:
        super().__init__(errno.ESTALE, f"inode {number}")
        self.number = number


_TABLE: dict[type[e.DcsError], int] = {
    e.Unauthenticated: errno.EACCES,
    e.PermissionDenied: errno.EACCES,
    e.NotFound: errno.ENOENT,
    e.AlreadyExists: errno.EEXIST,
    e.NotADirectory: errno.ENOTDIR,
    e.IsADirectory: errno.EISDIR,
    e.NotEmpty: errno.ENOTEMPTY,
    e.InvalidArgument: errno.EINVAL,
    e.NameTooLong: errno.ENAMETOOLONG,
    e.QuotaExceeded: errno.EDQUOT,
    e.SessionLost: errno.ESTALE,
    e.BucketBusy: errno.EBUSY,
}


def errno_of(error: BaseException) -> int:
    """The errno for an exception; EIO for everything that is not in the table.

    Reads that cannot be served (satellite or nodes away, too few shares, wrong bytes, deadline)
    are EIO: programs know it, and it never means that data was lost locally.
    """
    if isinstance(error, FsError):
        return error.errno
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return errno.ENOSPC
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    for cls in type(error).__mro__:
        if cls in _TABLE:
            return _TABLE[cls]
    return errno.EIO


def as_fs_error(error: Exception) -> Exception:
    """The FsError for an error in the table; others stay what they are."""
    code = _TABLE.get(type(error)) if isinstance(error, e.DcsError) else None
    return FsError(code, str(error)) if code is not None else error

"""Whatever happens below a FUSE handler, the kernel gets an errno and the mount lives on."""

import errno
import inspect

import pyfuse3
import pytest
import trio

from dcsfs.fs.directories import Scan
from dcsfs.fs.errors import FsError
from dcsfs.fs.xattrs import XATTR_CREATE, XATTR_REPLACE
from dcsfs.fuse.operations import DOTS, DcsOperations
from network.errors import Internal, TooFewShares, Unavailable

ARGUMENTS = {
    "inode": 1, "parent_inode": 1, "parent_inode_old": 1, "parent_inode_new": 1,
    "new_parent_inode": 1, "name": b"n", "name_old": b"n", "name_new": b"m", "new_name": b"m",
    "ctx": pyfuse3.RequestContext(), "mode": 0o100644, "rdev": 0, "target": b"t", "flags": 0,
    "fh": 1, "off": 0, "size": 4096, "buf": b"data", "datasync": False, "start_id": DOTS,
    "token": None, "value": b"v", "attr": pyfuse3.EntryAttributes(),
    "fields": pyfuse3.SetattrFields(), "inode_list": [(1, 1)],
}  # fmt: skip
ANSWERED_FROM_NOTHING = {"access", "releasedir", "forget"}
"""Handlers that need nothing of the file system, or are not to raise at all."""

FAILURES = [
    (FsError(errno.ENOTEMPTY), errno.ENOTEMPTY),
    (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
    (OSError(errno.EBADF, "a descriptor of ours"), errno.EIO),
    (Unavailable("away"), errno.EIO),
    (TooFewShares("gone"), errno.EIO),
    (Internal("over there"), errno.EIO),
    (trio.TooSlowError(), errno.EIO),
    (KeyError("a bug"), errno.EIO),
    (AssertionError("a bug"), errno.EIO),
    (RecursionError("a bug"), errno.EIO),
    (MemoryError(), errno.ENOMEM),
    (StopAsyncIteration(), errno.EIO),
    (ExceptionGroup("several", [ValueError("a bug"), KeyError("another")]), errno.EIO),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a name"), errno.EIO),
]


class NoResidence:
    """Nothing is evicted, and nothing can be recalled."""

    def begin(self):
        return 0

    def end(self, began):
        pass


class Failing:
    """A file system of which everything fails."""

    is_read_only = False
    residence = NoResidence()

    def __init__(self, failure):
        self._failure = failure

    def __getattr__(self, name):
        raise self._failure


def handlers():
    return sorted(
        name
        for name, function in vars(DcsOperations).items()
        if inspect.iscoroutinefunction(inspect.unwrap(function)) and not name.startswith("_")
    )


def test_pyfuse3_has_no_operation_that_nobody_thought_of():
    there = {
        name
        for name, function in vars(pyfuse3.Operations).items()
        if inspect.iscoroutinefunction(function)
    }
    # poll: the kernel takes ENOSYS for "always ready", as it is for regular files.
    assert there - set(handlers()) <= {"poll", "readdirplus", "syncfs", "ioctl"}


@pytest.mark.parametrize("name", handlers())
@pytest.mark.parametrize(("failure", "code"), FAILURES, ids=lambda value: type(value).__name__)
async def test_a_failure_below_is_an_errno(name, failure, code):
    operations = DcsOperations(Failing(failure), writeback_cache=False)
    operations._scans[1] = Scan(Failing(failure), 1)
    handler = getattr(operations, name)
    arguments = [ARGUMENTS[key] for key in inspect.signature(handler).parameters]
    if name in ANSWERED_FROM_NOTHING:
        await handler(*arguments)
        return
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await handler(*arguments)
    assert caught.value.errno == code


async def test_no_handler_outlives_its_deadline(autojump_clock):
    class Stuck:
        is_read_only = False
        residence = NoResidence()

        async def wait(self, *_, **__):
            await trio.sleep_forever()

        def __getattr__(self, name):
            return self if name in ("directories", "xattrs", "root", "volume") else self.wait

        number = 1
        open_count = 0

    operations = DcsOperations(Stuck(), writeback_cache=False)
    operations._scans[1] = Scan(Stuck(), 1)
    waiting = {"lookup", "getattr", "setattr", "mknod", "mkdir", "symlink", "unlink", "rmdir",
               "rename", "link", "open", "create", "read", "write", "flush", "fsyncdir", "readdir",
               "setxattr", "getxattr", "listxattr", "removexattr"}  # fmt: skip
    for name in sorted(waiting):
        handler = getattr(operations, name)
        arguments = [ARGUMENTS[key] for key in inspect.signature(handler).parameters]
        started = trio.current_time()
        with pytest.raises(pyfuse3.FUSEError):
            await handler(*arguments)
        assert trio.current_time() - started <= operations.deadline_s


async def test_flags_of_setxattr_are_told_from_the_question_before():
    """pyfuse3 asks getxattr with the same context first when there is a flag."""
    seen = []

    class Attributes:
        async def get(self, number, name):
            if name == b"user.absent":
                raise FsError(errno.ENODATA)
            return b"there"

        async def set(self, number, name, value, flags):
            seen.append(flags)

    class Known:
        xattrs = Attributes()
        residence = NoResidence()
        root = type("Root", (), {"number": 7})

    operations = DcsOperations(Known(), writeback_cache=False)
    create, replace, plain = (pyfuse3.RequestContext() for _ in range(3))
    with pytest.raises(pyfuse3.FUSEError):
        await operations.getxattr(1, b"user.absent", create)
    await operations.setxattr(1, b"user.absent", b"v", create)
    await operations.getxattr(1, b"user.there", replace)
    await operations.setxattr(1, b"user.there", b"v", replace)
    await operations.setxattr(1, b"user.there", b"v", plain)
    assert seen == [XATTR_CREATE, XATTR_REPLACE, 0]

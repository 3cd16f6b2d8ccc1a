"""Many kinds of operations at random in one tree, as fast as they go.

Run as `python stress.py DIRECTORY SEED COUNT`; several at once share the directory. Operations fail
as on any file system when others are at work (ENOENT, EEXIST, ...); any other failure ends it.
"""

import errno
import mmap
import os
import random
import sys

EXPECTED = {
    errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EINVAL,
    errno.ENODATA, errno.EPERM, errno.ELOOP, errno.EBUSY, errno.ESTALE,
}  # fmt: skip


class Worker:
    """One process's random work."""

    def __init__(self, root: str, seed: int) -> None:
        self.root, self.seed, self.random = root, seed, random.Random(seed)

    def path(self) -> str:
        """A name in a tree of at most three levels that all workers share."""
        depth = self.random.choice((1, 2, 2, 3))
        return "/".join([self.root, *(f"n{self.random.randrange(5)}" for _ in range(depth))])

    def step(self) -> None:
        """One operation; raises OSError."""
        name, other = self.path(), self.path()
        getattr(self, "do_" + self.random.choice(OPERATIONS))(name, other)

    def do_write(self, name: str, other: str) -> None:
        flags = self.random.choice((0, os.O_TRUNC, os.O_APPEND)) | os.O_CREAT | os.O_RDWR
        descriptor = os.open(name, flags, 0o644)
        try:
            for _ in range(self.random.randrange(1, 5)):
                data = self.random.randbytes(self.random.choice((1, 4096, 70_000)))
                os.pwrite(descriptor, data, self.random.randrange(300_000))
            if self.random.random() < 0.1:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def do_map(self, name: str, other: str) -> None:
        # A file of its own: one that others cut while it is mapped is SIGBUS anywhere.
        with open(f"{self.root}/mapped {self.seed}", "w+b") as handle:
            handle.truncate(self.random.randrange(4096, 100_000))
            with mmap.mmap(handle.fileno(), 0) as mapped:
                place = self.random.randrange(len(mapped) - 10)
                mapped[place : place + 10] = b"0123456789"
                handle.seek(place)
                assert handle.read(10) == b"0123456789"

    def do_read(self, name: str, other: str) -> None:
        with open(name, "rb") as handle:
            handle.read()

    def do_open_unlinked(self, name: str, other: str) -> None:
        with open(name, "r+b") as handle:
            os.unlink(name)
            handle.write(b"gone")
            handle.seek(0)
            handle.read()  # others may reach it by another name: what is there is theirs to say

    def do_truncate(self, name: str, other: str) -> None:
        os.truncate(name, self.random.randrange(400_000))

    def do_mkdir(self, name: str, other: str) -> None:
        os.mkdir(name)

    def do_rmdir(self, name: str, other: str) -> None:
        os.rmdir(name)

    def do_unlink(self, name: str, other: str) -> None:
        os.unlink(name)

    def do_rename(self, name: str, other: str) -> None:
        os.rename(name, other)

    def do_link(self, name: str, other: str) -> None:
        os.link(name, other, follow_symlinks=False)

    def do_symlink(self, name: str, other: str) -> None:
        os.symlink(os.path.basename(name), other)

    def do_chmod(self, name: str, other: str) -> None:
        os.chmod(name, 0o600 | self.random.randrange(64))

    def do_times(self, name: str, other: str) -> None:
        os.utime(name, ns=(self.random.randrange(10**18), self.random.randrange(10**18)))

    def do_xattr(self, name: str, other: str) -> None:
        os.setxattr(name, f"user.{self.random.randrange(3)}", self.random.randbytes(50))

    def do_xattr_remove(self, name: str, other: str) -> None:
        os.removexattr(name, f"user.{self.random.randrange(3)}")

    def do_list(self, name: str, other: str) -> None:
        with os.scandir(os.path.dirname(name)) as entries:
            names = [entry.name for entry in entries]
        assert len(names) == len(set(names)), names


OPERATIONS = [name.removeprefix("do_") for name in dir(Worker) if name.startswith("do_")]
OPERATIONS += ["write", "write", "mkdir", "rename", "link"]


def main() -> None:
    worker = Worker(sys.argv[1], int(sys.argv[2]))
    done = 0
    for _ in range(int(sys.argv[3])):
        try:
            worker.step()
            done += 1
        except OSError as error:
            if error.errno not in EXPECTED:
                raise
    print(done)


if __name__ == "__main__":
    main()

"""Two mounts of one bucket in two processes against one local directory: a random schedule."""

import contextlib
import errno
import hashlib
import os
import random
import signal
import stat
import time

import pytest


def snapshot(root):
    """What a program can see of a tree, but for inode numbers, ctime and directories' sizes."""
    found = {}
    groups = {}
    for base, directories, files in os.walk(root):
        for name in sorted(directories + files):
            path = os.path.join(base, name)
            info = os.lstat(path)
            kind = stat.S_IFMT(info.st_mode)
            content = ""
            if kind == stat.S_IFREG:
                with open(path, "rb") as handle:
                    content = hashlib.blake2b(handle.read()).hexdigest()[:16]
            elif kind == stat.S_IFLNK:
                content = os.readlink(path)
            size = 0 if kind == stat.S_IFDIR else info.st_size
            attributes = {a: os.getxattr(path, a, follow_symlinks=False) for a in xattrs(path)}
            key = os.path.relpath(path, root)
            found[key] = (
                kind,
                stat.S_IMODE(info.st_mode),
                info.st_nlink,
                size,
                content,
                attributes,
            )
            groups.setdefault(info.st_ino, []).append(key)
    same = sorted(sorted(group) for group in groups.values() if len(group) > 1)
    return found, same


def by_path(root, paths):
    """What names stand for, asked without a listing, which would tell the kernel anew."""
    found = {}
    for path in paths:
        try:
            info = os.lstat(root / path)
            content = (root / path).read_bytes() if stat.S_ISREG(info.st_mode) else b""
        except OSError as error:
            found[path] = errno.errorcode[error.errno]
            continue
        found[path] = (info.st_mode, info.st_nlink, content)
    return found


def xattrs(path):
    return [a for a in os.listxattr(path, follow_symlinks=False) if a.startswith("user.")]


class Steps:
    """The same random operation on two trees; both must end alike, errno included."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def path(self):
        depth = self.random.choice((1, 1, 2, 3))
        return "/".join(f"n{self.random.randrange(4)}" for _ in range(depth))

    def draw(self):
        r = self.random
        name, other = self.path(), self.path()
        data = r.randbytes(r.choice((0, 10, 5000, 70_000, 300_000)))
        offset, size = r.randrange(200_000), r.randrange(250_000)
        mode = r.choice((0o600, 0o644, 0o755))
        return r.choice((
            ("write", lambda t: write(f"{t}/{name}", data)),
            ("write", lambda t: write(f"{t}/{name}", data)),
            ("patch", lambda t: patch(f"{t}/{name}", offset, data[:20_000] or b"x")),
            ("append", lambda t: append(f"{t}/{name}", data[:9_000])),
            ("truncate", lambda t: os.truncate(f"{t}/{name}", size)),
            ("excl", lambda t: os.close(os.open(f"{t}/{name}", os.O_CREAT | os.O_EXCL, 0o644))),
            ("mkdir", lambda t: os.mkdir(f"{t}/{name}")),
            ("mkdir", lambda t: os.mkdir(f"{t}/{name}")),
            ("rmdir", lambda t: os.rmdir(f"{t}/{name}")),
            ("unlink", lambda t: os.unlink(f"{t}/{name}")),
            ("rename", lambda t: os.rename(f"{t}/{name}", f"{t}/{other}")),
            ("rename", lambda t: os.rename(f"{t}/{name}", f"{t}/{other}")),
            ("link", lambda t: os.link(f"{t}/{name}", f"{t}/{other}")),
            ("symlink", lambda t: os.symlink(name, f"{t}/{other}")),
            ("chmod", lambda t: os.chmod(f"{t}/{name}", mode)),
            ("setxattr", lambda t: os.setxattr(f"{t}/{name}", "user.a", data[:100])),
        ))  # fmt: skip


def write(path, data):
    with open(path, "wb") as handle:
        handle.write(data)


def patch(path, offset, data):
    with open(path, "r+b") as handle:
        handle.seek(offset)
        handle.write(data)


def append(path, data):
    with open(path, "ab") as handle:
        handle.write(data)


@contextlib.contextmanager
def stopped(mount):
    """The mount's process does not run in the block."""
    pid = mount.status()["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def outcome(action, root):
    try:
        action(root)
    except OSError as error:
        return error.errno
    return 0


@pytest.mark.parametrize("seed", [1, 2])
def test_random_schedule_with_stops_kills_and_returns(mount_of, net, tmp_path, seed):
    bucket = net.bucket(f"pair-{seed}")
    mounts = [mount_of(bucket), mount_of(bucket, "-b")]
    for mount in mounts:
        mount.mount()
    reference = tmp_path / "reference"
    reference.mkdir()
    steps, chance = Steps(seed), random.Random(seed + 100)
    deadline = time.monotonic() + 100
    paths = set()
    events = {40: "stop", 80: "kill", 120: "restart", 160: "umount"}
    for number in range(200):
        assert time.monotonic() < deadline, number
        mount, other = chance.sample(mounts, 2)
        kind, action = steps.draw()
        event = events.get(number)
        # The other one is away, longer than it may trust its memory.
        with stopped(other) if event == "stop" else contextlib.nullcontext():
            expected, found = outcome(action, reference), outcome(action, mount.point)
        assert found == expected, (number, kind)
        if event == "kill":
            other.kill()
            other.mount()
        elif event == "restart":
            net.testnet("kill", "--satellite")
            net.testnet("revive")
        elif event == "umount":
            other.umount()
            other.mount()
        wanted = snapshot(reference)
        paths |= set(wanted[0])
        expected = by_path(reference, paths)
        for each in mounts:
            assert by_path(each.point, paths) == expected, (number, kind, each.point)
            assert snapshot(each.point) == wanted, (number, kind, each.point)

"""Operations on names as ratios to a null pyfuse3 file system and to ext4, in the same run.

The null file system keeps a tree in dictionaries and does nothing else: the ceiling of stock
pyfuse3. Each workload runs three times on each, in an order of its own each time; medians. Usage:

    .venv/bin/python benchmarks/names.py [--files 10000] [--tree 5000]

Prints operations per second and the ratios; void if the mount's log was not synced.
"""

import argparse
import errno
import json
import os
import shutil
import stat
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyfuse3
import trio

BIN = Path(sys.executable).parent


class Node:
    """An inode of the null file system."""

    def __init__(self, number: int, mode: int) -> None:
        self.number = number
        self.mode = mode
        self.data = bytearray()
        self.children: dict[bytes, Node] = {}
        self.mtime = time.time_ns()


class NullTree(pyfuse3.Operations):
    """A tree in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes = {1: Node(1, stat.S_IFDIR | 0o755)}

    def _attributes(self, node: Node) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(node.number)
        entry.st_mode = pyfuse3.ModeT(node.mode)
        entry.st_nlink = 1
        entry.st_size = len(node.data)
        entry.st_mtime_ns = entry.st_ctime_ns = node.mtime
        entry.attr_timeout = entry.entry_timeout = 300
        return entry

    def _make(self, parent: int, name: bytes, mode: int) -> pyfuse3.EntryAttributes:
        node = Node(len(self.nodes) + 1, mode)
        self.nodes[node.number] = node
        self.nodes[parent].children[name] = node
        return self._attributes(node)

    def _child(self, parent: int, name: bytes) -> Node:
        found = self.nodes[parent].children.get(name)
        if found is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return found

    async def lookup(self, parent_inode: int, name: bytes, ctx: object) -> pyfuse3.EntryAttributes:
        """Find."""
        return self._attributes(self._child(parent_inode, name))

    async def getattr(self, inode: int, ctx: object) -> pyfuse3.EntryAttributes:
        """Attributes."""
        return self._attributes(self.nodes[inode])

    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: object,
        ctx: object,
    ) -> pyfuse3.EntryAttributes:
        """Mode, size, mtime."""
        node = self.nodes[inode]
        if fields.update_mode:
            node.mode = attr.st_mode
        if fields.update_size:
            del node.data[attr.st_size :]
        if fields.update_mtime:
            node.mtime = attr.st_mtime_ns
        return self._attributes(node)

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: object
    ) -> pyfuse3.EntryAttributes:
        """Make a directory."""
        return self._make(parent_inode, name, stat.S_IFDIR | stat.S_IMODE(mode))

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: object
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """Make a file."""
        entry = self._make(parent_inode, name, mode)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(entry.st_ino)), entry

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        """The handle is the inode."""
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), keep_cache=True)

    async def opendir(self, inode: int, ctx: object) -> int:
        """The handle is the inode."""
        return inode

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Bytes."""
        return bytes(self.nodes[fh].data[off : off + size])

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Keep them."""
        data = self.nodes[fh].data
        data[off : off + len(buf)] = buf
        return len(buf)

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """In order of making."""
        for number, (name, node) in enumerate(list(self.nodes[fh].children.items()), 1):
            if number > start_id and not pyfuse3.readdir_reply(
                token, pyfuse3.FileNameT(name), self._attributes(node), number
            ):
                break

    async def unlink(self, parent_inode: int, name: bytes, ctx: object) -> None:
        """Remove."""
        del self.nodes[parent_inode].children[name]

    async def rmdir(self, parent_inode: int, name: bytes, ctx: object) -> None:
        """Remove."""
        del self.nodes[parent_inode].children[name]

    async def rename(
        self, old: int, name_old: bytes, new: int, name_new: bytes, flags: int, ctx: object
    ) -> None:
        """Move."""
        self.nodes[new].children[name_new] = self.nodes[old].children.pop(name_old)

    async def getxattr(self, inode: int, name: bytes, ctx: object) -> bytes:
        """None."""
        raise pyfuse3.FUSEError(errno.ENODATA)

    async def flush(self, fh: int) -> None:
        """Nothing."""

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Nothing."""

    async def release(self, fh: int) -> None:
        """Nothing."""

    async def releasedir(self, fh: int) -> None:
        """Nothing."""


def serve_null(point: str) -> None:
    """Mount the null file system and serve until unmounted."""
    pyfuse3.init(NullTree(), point, {"fsname=null", "default_permissions"})
    trio.run(pyfuse3.main)
    pyfuse3.close()


def make_sources(base: Path, count: int) -> Path:
    """A tar file of `count` small files in directories of 50."""
    tree = base / "tree"
    for number in range(count):
        path = tree / f"d{number // 500}" / f"e{number // 50 % 10}" / f"file{number}.c"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(500 + number % 7000))
    archive = base / "tree.tar"
    subprocess.run(["tar", "-C", str(tree), "-cf", str(archive), "."], check=True)
    return archive


def run_once(root: Path, files: int, archive: Path, count: int) -> dict[str, float]:
    """Operations per second of each workload, in a fresh directory."""
    rates: dict[str, float] = {}

    def timed(name: str, operations: int, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        work()
        rates[name] = operations / (time.perf_counter() - started)

    base = Path(tempfile.mkdtemp(dir=root))
    names = [f"{base}/f{number}" for number in range(files)]
    timed("create", files, lambda: [os.close(os.open(n, os.O_CREAT | os.O_WRONLY)) for n in names])
    Path("/proc/sys/vm/drop_caches").write_text("2")  # dentries and inodes: stat asks again
    timed("stat", files, lambda: [os.stat(n) for n in names])
    timed("unlink", files, lambda: [os.unlink(n) for n in names])
    tree = base / "tree"
    tree.mkdir()
    timed("untar", count, lambda: subprocess.run(["tar", "-C", tree, "-xf", archive], check=True))
    git = ["git", "-C", str(tree), "-c", "core.fsync=none"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "-A"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("2")
    status = [*git, "status", "--porcelain"]
    timed("git status", count, lambda: subprocess.run(status, check=True, capture_output=True))
    shutil.rmtree(base)
    return rates


def dcsfs(*arguments: str) -> str:
    """Run the command line of this checkout."""
    return subprocess.run(
        [str(BIN / "dcsfs"), *arguments], check=True, capture_output=True, text=True
    ).stdout


def measure(base: Path, files: int, count: int) -> tuple[dict[str, list[dict[str, float]]], int]:
    """All rates by file system, and how often the mount has synced its log."""
    archive = make_sources(base, count)
    places = {name: base / name for name in ("ext4", "null", "dcsfs")}
    for place in places.values():
        place.mkdir()
    net, found = str(base / "net"), {name: list[dict[str, float]]() for name in places}
    server = subprocess.Popen([sys.executable, __file__, "--serve", str(places["null"])])
    try:
        dcsfs("testnet", "up", "--dir", net)
        grant = f"{net}/access.grant"
        dcsfs("mb", "--access", grant, "dcs://bench")
        options = f"access={grant},cache_dir={base / 'cache'}"
        subprocess.run(
            ["mount", "-t", "dcsfs", "bench", places["dcsfs"], "-o", options], check=True, cwd="/"
        )
        order = list(places)
        for _ in range(3):
            for name in order:
                found[name].append(run_once(places[name], files, archive, count))
            order.append(order.pop(0))
        dcsfs("sync", str(places["dcsfs"]))
        syncs = json.loads(dcsfs("status", "--json", str(places["dcsfs"])))["log_syncs"]
        subprocess.run(["umount", places["dcsfs"]], check=True)
    finally:
        subprocess.run(["umount", places["null"]], check=False)
        server.wait(30)
        subprocess.run([str(BIN / "dcsfs"), "testnet", "down", "--dir", net], check=False)
    return found, int(syncs)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--tree", type=int, default=5_000)
    parser.add_argument("--serve")
    options = parser.parse_args()
    if options.serve:
        serve_null(options.serve)
        return 0
    base = Path(tempfile.mkdtemp(prefix="dcsfs-names-", dir="/var/tmp"))
    try:
        found, syncs = measure(base, options.files, options.tree)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    for workload in found["ext4"][0]:
        rate = {
            name: statistics.median(item[workload] for item in runs) for name, runs in found.items()
        }
        print(
            f"{workload:10} dcsfs {rate['dcsfs']:8.0f}/s   null {rate['null']:8.0f}/s "
            f"({rate['dcsfs'] / rate['null']:.2f})   ext4 {rate['ext4']:8.0f}/s "
            f"({rate['dcsfs'] / rate['ext4']:.3f})"
        )
    print(f"log syncs {syncs}")
    if not syncs:
        print("VOID: the log was never synced")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

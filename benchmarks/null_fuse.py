"""Streaming through the mount as a ratio to a null pyfuse3 file system, in the same run.

The null file system throws writes away and reads zeros: the ceiling of pyfuse3 itself. Prints
MB/s and ratios, with fdatasync count, bytes verified and node bytes; void if one is 0. Usage:

    .venv/bin/python benchmarks/null_fuse.py [--mib 512]
"""

import argparse
import errno
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyfuse3
import trio

BIN = Path(sys.executable).parent
MIB = 1 << 20
_ZEROS = memoryview(bytes(MIB))


class NullOperations(pyfuse3.Operations):
    """One directory with one file of any size; nothing is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(inode)
        entry.st_mode = pyfuse3.ModeT(0o40755 if inode == 1 else 0o100644)
        entry.st_nlink = 1
        entry.st_size = 0 if inode == 1 else self.size
        entry.attr_timeout = entry.entry_timeout = 300
        return entry

    async def getattr(self, inode: int, ctx: object) -> pyfuse3.EntryAttributes:
        """Attributes."""
        return self._attributes(inode)

    async def setattr(
        self, inode: int, attr: pyfuse3.EntryAttributes, fields: object, fh: object, ctx: object
    ) -> pyfuse3.EntryAttributes:
        """Takes anything."""
        return self._attributes(inode)

    async def lookup(self, parent_inode: int, name: bytes, ctx: object) -> pyfuse3.EntryAttributes:
        """The file exists once it has a size."""
        if not self.size:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(2)

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: object
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """Make the file."""
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(1)), self._attributes(2)

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        """Open the file."""
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(1))

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Throw it away."""
        self.size = max(self.size, off + len(buf))
        return len(buf)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Zeros."""
        return _ZEROS[: max(0, min(size, self.size - off))]  # type: ignore[return-value]  # any buffer

    async def getxattr(self, inode: int, name: bytes, ctx: object) -> bytes:
        """None."""
        raise pyfuse3.FUSEError(errno.ENODATA)

    async def flush(self, fh: int) -> None:
        """Nothing."""

    async def release(self, fh: int) -> None:
        """Nothing."""


def serve_null(point: str) -> None:
    """Mount the null file system and serve until unmounted."""
    pyfuse3.init(NullOperations(), point, {"fsname=null", "default_permissions"})
    trio.run(pyfuse3.main)
    pyfuse3.close()


def stream(path: Path, mib: int) -> tuple[float, float]:
    """(write, read) in MB/s, in 1 MiB calls, the page cache dropped between."""
    block = memoryview(os.urandom(MIB))
    started = time.perf_counter()
    with path.open("wb", buffering=0) as handle:
        for _ in range(mib):
            handle.write(block)
    wrote = time.perf_counter() - started
    Path("/proc/sys/vm/drop_caches").write_text("1")
    buffer = bytearray(MIB)
    started = time.perf_counter()
    with path.open("rb", buffering=0) as handle:
        while handle.readinto(buffer):
            pass
    read = time.perf_counter() - started
    return mib * MIB / 1e6 / wrote, mib * MIB / 1e6 / read


def dcsfs(*arguments: str) -> str:
    """Run the command line of this checkout."""
    return subprocess.run(
        [str(BIN / "dcsfs"), *arguments], check=True, capture_output=True, text=True
    ).stdout


def main() -> int:
    """Measure both, three times each, medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--serve")
    options = parser.parse_args()
    if options.serve:
        serve_null(options.serve)
        return 0
    base = Path(tempfile.mkdtemp(prefix="dcsfs-null-", dir="/var/tmp"))
    null, point, net = base / "null", base / "mnt", str(base / "net")
    null.mkdir()
    point.mkdir()
    try:
        server = subprocess.Popen([sys.executable, __file__, "--serve", str(null)])
        while not os.path.ismount(null):
            time.sleep(0.05)  # noqa: TID251 -- a script waiting for a process
        nulls = [stream(null / f"f{n}", options.mib) for n in range(3)]
        subprocess.run(["umount", str(null)], check=True)
        server.wait()
        dcsfs("testnet", "up", "--dir", net)
        grant = f"{net}/access.grant"
        dcsfs("mb", "--access", grant, "dcs://bench")
        subprocess.run(
            ["mount", "-t", "dcsfs", "bench", str(point),
             "-o", f"access={grant},cache_dir={base / 'cache'}"], check=True, cwd="/",
        )  # fmt: skip
        ours = []
        for number in range(3):
            ours.append(stream(point / f"f{number}", options.mib))
            dcsfs("sync", str(point))
        status = json.loads(dcsfs("status", "--json", str(point)))
        nodes = json.loads(dcsfs("testnet", "status", "--json", "--dir", net))["nodes"]
        subprocess.run(["umount", str(point)], check=True)
    finally:
        subprocess.run([str(BIN / "dcsfs"), "testnet", "down", "--dir", net], check=False)
        shutil.rmtree(base, ignore_errors=True)
    for number, name in enumerate(("write", "read")):
        ceiling = statistics.median(item[number] for item in nulls)
        speed = statistics.median(item[number] for item in ours)
        print(f"{name:5} null {ceiling:6.0f} MB/s, dcsfs {speed:6.0f} MB/s, {speed / ceiling:.2f}")
    syncs = status["log_syncs"] + sum(node["syncs"] or 0 for node in nodes)
    received = sum(node["received_bytes"] or 0 for node in nodes)
    print(f"fdatasyncs {syncs}, bytes verified {status['received_bytes']}, node bytes {received}")
    if not syncs or not received:
        print("VOID: a counter is zero")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

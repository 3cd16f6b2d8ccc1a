"""Upload and download of one large file against 110 local nodes, by library and through the mount.

Prints MB/s (10^6 bytes) and the ratio to encrypt + encode + hash alone, measured in the same run.
A run is void when nothing was synced, verified or stored. Usage:

    .venv/bin/python benchmarks/throughput.py [--mib 1024]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import trio

from dcsfs import keys, load_access, open_project
from network import piecehash
from network.erasure import code_for
from network.ids import ExtentID

BIN = Path(sys.executable).parent
MIB = 1 << 20


def dcsfs(*arguments: str) -> str:
    """Run the command line of this checkout."""
    return subprocess.run(
        [str(BIN / "dcsfs"), *arguments], check=True, capture_output=True, text=True
    ).stdout


def pipeline_alone(mib: int) -> float:
    """MB/s of encrypting, encoding 29/80 and hashing in one thread: the ceiling's CPU part."""
    code = code_for(29, 80)
    plain = memoryview(os.urandom(29 * 65536))
    sealed = bytearray(29 * 65552)
    stripes = max(8, mib * MIB // len(plain) // 8)
    started = time.perf_counter()
    for number in range(stripes):
        extent = ExtentID(number.to_bytes(16, "big"))
        keys.encrypt_records(bytes(32), extent, 0, plain, True, memoryview(sealed))
        data = bytes(sealed)
        view = memoryview(data)
        shares = [view[i * 65552 : (i + 1) * 65552] for i in range(29)]
        for share in (*shares, *code.parity(data)):
            piecehash.share_hash(share)
    return stripes * len(plain) / 1e6 / (time.perf_counter() - started)


def node_counters(directory: str) -> tuple[int, int, int]:
    """(fdatasync calls, bytes received, bytes served) of all nodes."""
    nodes = json.loads(dcsfs("testnet", "status", "--json", "--dir", directory))["nodes"]
    names = ("syncs", "received_bytes", "served_bytes")
    return tuple(sum(node[name] or 0 for node in nodes) for name in names)  # type: ignore[return-value]  # three names, three sums


async def by_library(grant: str, source: Path) -> tuple[float, float, int]:
    """(seconds up, seconds down, bytes verified) of the library."""
    access = load_access(Path(grant))

    async def parts() -> Any:
        with source.open("rb") as handle:
            while part := handle.read(MIB):
                yield part

    async with open_project(access) as project:
        async with project.open_bucket("bench") as bucket:
            started = time.perf_counter()
            await bucket.write_file("by-library", parts())
            await bucket.sync()
            up = time.perf_counter() - started
        async with project.open_bucket("bench", read_only=True) as bucket:
            started = time.perf_counter()
            size = 0
            async for part in bucket.read_file("by-library"):
                size += len(part)
            down = time.perf_counter() - started
            assert size == source.stat().st_size
            return up, down, bucket.mounted.client.counters.received_bytes


def read_through(path: Path) -> float:
    """Seconds to read a file in 1 MiB calls."""
    buffer = bytearray(MIB)
    started = time.perf_counter()
    with path.open("rb", buffering=0) as handle:
        while handle.readinto(buffer):
            pass
    return time.perf_counter() - started


def through_mount(base: Path, grant: str, source: Path) -> tuple[float, float, float, int, int]:
    """(seconds to stage, seconds to the network, seconds down, bytes verified, peak PSS)."""
    point, cache = base / "mnt", base / "cache"
    point.mkdir(exist_ok=True)
    options = f"access={grant},cache_dir={cache}"
    subprocess.run(
        ["mount", "-t", "dcsfs", "bench", str(point), "-o", options], check=True, cwd="/"
    )
    peak = 0

    def pss() -> int:
        pid = json.loads(dcsfs("status", "--json", str(point)))["pid"]
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))

    started = time.perf_counter()
    buffer = memoryview(bytearray(MIB))
    with (
        source.open("rb", buffering=0) as reading,
        (point / "by-mount").open("wb", buffering=0) as writing,
    ):
        while count := reading.readinto(buffer):
            writing.write(buffer[:count])
    staged = time.perf_counter() - started
    dcsfs("sync", str(point))
    up = time.perf_counter() - started
    peak = pss()
    subprocess.run(["umount", str(point)], check=True)
    shutil.rmtree(cache)
    subprocess.run(
        ["mount", "-t", "dcsfs", "bench", str(point), "-o", options], check=True, cwd="/"
    )
    down = read_through(point / "by-mount")
    peak = max(peak, pss())
    verified = json.loads(dcsfs("status", "--json", str(point)))["received_bytes"]
    subprocess.run(["umount", str(point)], check=True)
    return staged, up, down, verified, peak


def main() -> int:
    """Run all and print a JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--nodes", default="110")
    options = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="dcsfs-bench-", dir="/var/tmp"))
    directory = str(base / "net")
    size = options.mib * MIB / 1e6
    try:
        source = base / "source"
        with source.open("wb") as handle:
            for _ in range(options.mib):
                handle.write(os.urandom(MIB))
        alone = pipeline_alone(options.mib)
        dcsfs("testnet", "up", "--dir", directory, "--nodes", options.nodes)
        grant = f"{directory}/access.grant"
        dcsfs("mb", "--access", grant, "dcs://bench")
        lib_up, lib_down, lib_verified = trio.run(by_library, grant, source)
        staged, up, down, verified, peak = through_mount(base, grant, source)
        syncs, received, served = node_counters(directory)
    finally:
        subprocess.run([str(BIN / "dcsfs"), "testnet", "down", "--dir", directory], check=False)
        shutil.rmtree(base, ignore_errors=True)
    rows = {
        "library up": size / lib_up,
        "library down": size / lib_down,
        "mount staged": size / staged,
        "mount up": size / up,
        "mount down": size / down,
    }
    print(f"encrypt + encode + hash alone, one thread: {alone:.0f} MB/s")
    for name, speed in rows.items():
        print(f"{name:14} {speed:7.1f} MB/s  {speed / alone:5.2f} of that")
    print(f"peak PSS of the mount: {peak / 1024:.0f} MiB")
    print(f"node fdatasyncs {syncs}, bytes to nodes {received}, from nodes {served}")
    print(f"bytes verified: library {lib_verified}, mount {verified}")
    print(json.dumps({"mib": options.mib, "alone": alone, **rows}))
    if not all((syncs, received, served, lib_verified, verified)):
        print("VOID: a counter is zero")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Copy a real tree into a mounted bucket, lose nodes, and compare every byte.

`scripts/demo --check` runs it small; tests/mount runs it in full. Prints what it did with
figures; exits 0 when everything is identical, 1 with the first difference otherwise.
"""

import argparse
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
MIB = 1 << 20
EDGE_SIZES = (0, 1, 4095, 4096, 4097, 65535, 65536, 65537)
EIO_WITHIN_S = 60.0


class Failure(Exception):
    """A check that did not hold."""


def run(*command: str, check: bool = True, **extra: Any) -> "subprocess.CompletedProcess[str]":
    """Run a command, with its output in the error when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **extra)
    if check and done.returncode:
        raise Failure(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()[-400:]}")
    return done


def dcsfs(*arguments: str) -> str:
    """Run the command line of this checkout."""
    return run(str(BIN / "dcsfs"), *arguments).stdout


def say(text: str) -> None:
    """Report a step with the time."""
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", flush=True)


STARTED = time.monotonic()


class Network:
    """A test network and one mount on it."""

    def __init__(self, base: Path, nodes: int, redundancy: str) -> None:
        self.directory = base / f"net{nodes}"
        self.grant = str(self.directory / "access.grant")
        self.mountpoint = base / f"mnt{nodes}"
        self.cache = base / f"cache{nodes}"
        self.mountpoint.mkdir()
        dcsfs("testnet", "up", "--dir", str(self.directory), "--nodes", str(nodes),
              "--redundancy", redundancy)  # fmt: skip
        dcsfs("mb", "--access", self.grant, "dcs://photos")

    def mount(self) -> None:
        """`mount -t dcsfs`, as a user would."""
        run("mount", "-t", "dcsfs", "photos", str(self.mountpoint),
            "-o", f"access={self.grant},cache_dir={self.cache}", cwd="/")  # fmt: skip

    def unmount(self) -> None:
        """umount(8); returns when everything is on the network."""
        run("umount", str(self.mountpoint))

    def remount_cold(self) -> None:
        """Unmount, delete the cache directory, mount again."""
        self.unmount()
        shutil.rmtree(self.cache)
        self.mount()

    def mount_status(self) -> dict[str, Any]:
        """`dcsfs status --json`."""
        values: dict[str, Any] = json.loads(dcsfs("status", "--json", str(self.mountpoint)))
        return values

    def status(self) -> dict[str, Any]:
        """`testnet status --json`."""
        found = dcsfs("testnet", "status", "--json", "--dir", str(self.directory))
        values: dict[str, Any] = json.loads(found)
        return values

    def database_bytes(self) -> int:
        """The satellite's database with its write-ahead log."""
        return sum(p.stat().st_size for p in (self.directory / "satellite").glob("satellite.db*"))

    def kill(self, count: int, seed: int) -> list[str]:
        """Kill nodes hard and see that their addresses refuse connections."""
        names = dcsfs("testnet", "kill", "--dir", str(self.directory), "--count", str(count),
                      "--seed", str(seed)).split()  # fmt: skip
        killed = [n for n in self.status()["nodes"] if n["id"] in names]
        for node in killed:
            host, _, port = node["address"].rpartition(":")
            try:
                socket.create_connection((host, int(port)), 2).close()
            except ConnectionRefusedError:
                continue
            raise Failure(f"killed node {node['address']} still accepts connections")
        return names

    def close(self) -> None:
        """Stop everything, whatever state it is in."""
        if os.path.ismount(self.mountpoint):
            run(str(BIN / "dcsfs"), "umount", "--detach", str(self.mountpoint), check=False)
        if os.path.ismount(self.mountpoint):
            run("umount", "-i", "-l", str(self.mountpoint), check=False)
        run(str(BIN / "dcsfs"), "testnet", "down", "--dir", str(self.directory), check=False)


def make_source(target: Path, big_mib: int, whole_library: bool) -> None:
    """A tree with everything that has to survive: links, modes, times, holes, edge sizes."""
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = ["site-packages", "__pycache__", "test", "tests", "config-*", "ensurepip"]
    if not whole_library:
        skipped += ["lib2to3", "idlelib", "encodings", "tkinter", "pydoc_data", "lib-dynload"]
    shutil.copytree(library, target / "lib", symlinks=True, ignore=shutil.ignore_patterns(*skipped))
    for size in EDGE_SIZES:
        (target / f"size-{size}").write_bytes(os.urandom(size))
    with (target / "big").open("wb") as handle:
        for _ in range(big_mib):
            handle.write(os.urandom(MIB))
    with (target / "sparse").open("wb") as handle:
        handle.seek(5 * MIB)
        handle.write(b"in the middle")
        handle.truncate(40 * MIB)
    (target / "symlink").symlink_to("lib/os.py")
    (target / "dangling").symlink_to("nowhere/at all")
    os.link(target / "big", target / "hard link")
    (target / "modes").mkdir(mode=0o2751)
    for mode in (0o000, 0o400, 0o644, 0o4755, 0o1777):
        path = target / "modes" / f"{mode:o}"
        path.write_text("x")
        path.chmod(mode)
    os.utime(target / "size-1", ns=(1_234_567_890_123_456_789, 1_000_000_000_000_000_001))
    (target / "name with \u00fc and \n newline").write_text("y")


def walk(root: Path) -> Iterator[Path]:
    """Every path below root, in order."""
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted([*folders, *names]):
            yield Path(folder) / name


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def compare(source: Path, copy: Path) -> int:
    """Compare trees by diff, stat and SHA-256; returns the bytes compared."""
    run("diff", "-r", "--no-dereference", str(source), str(copy))
    total = 0
    wanted, found = list(walk(source)), list(walk(copy))
    if [p.relative_to(source) for p in wanted] != [p.relative_to(copy) for p in found]:
        raise Failure("the trees have different names")
    for one, other in zip(wanted, found, strict=True):
        a, b = one.lstat(), other.lstat()
        fields = ["st_mode", "st_uid", "st_gid", "st_mtime_ns", "st_nlink"]
        if not one.is_dir():
            fields.append("st_size")
        if one.is_dir():
            fields.remove("st_nlink")
        for name in fields:
            if getattr(a, name) != getattr(b, name):
                raise Failure(f"{other}: {name} is {getattr(b, name)}, was {getattr(a, name)}")
        if one.is_file() and not one.is_symlink():
            total += a.st_size
            if digest(one) != digest(other):
                raise Failure(f"{other}: content differs")
    sparse = (copy / "sparse").stat()
    if sparse.st_blocks * 512 >= sparse.st_size // 2:
        raise Failure("the sparse file takes its full size")
    return total


def round_trip(base: Path, big_mib: int, whole_library: bool) -> None:
    """110 nodes, 30 of them killed."""
    source = base / "source"
    source.mkdir()
    make_source(source, big_mib, whole_library)
    net = Network(base, 110, "29/35/80/110")
    try:
        say("110 nodes are up, bucket made")
        before = net.database_bytes()
        net.mount()
        started = time.monotonic()
        run("cp", "-a", f"{source}/.", str(net.mountpoint))
        copied = time.monotonic() - started
        net.remount_cold()
        total = compare(source, net.mountpoint)
        say(
            f"copied {total / 1e6:.0f} MB in {copied:.1f} s, unmounted, cache deleted, "
            "remounted: identical"
        )
        growth = net.database_bytes() - before
        received = net.mount_status()["received_bytes"]
        files = sum(1 for _ in walk(source))
        say(
            f"satellite database grew {growth / 1e6:.2f} MB ({100 * growth / total:.2f} % of "
            f"{total / 1e6:.0f} MB, {files} names); {received / 1e6:.0f} MB came from nodes"
        )
        unique = total - (source / "big").stat().st_size  # the hard link is read once
        if received < unique - 64 * MIB:
            raise Failure("fewer bytes came from nodes than were read")
        if whole_library and growth * 100 > unique:
            raise Failure("the satellite's database grew by more than 1 %")
        net.kill(30, seed=1)
        net.remount_cold()
        compare(source, net.mountpoint)
        say("30 of 110 nodes killed, cold cache: identical")
        net.unmount()
    finally:
        net.close()


def limits(base: Path) -> None:
    """80 nodes: 51 may die, 52 may not, and nothing is lost when they come back."""
    net = Network(base, 80, "29/35/80/80")
    try:
        data = os.urandom(24 * MIB + 12345)
        net.mount()
        (net.mountpoint / "file").write_bytes(data)
        killed = []
        net.unmount()
        shutil.rmtree(net.cache)
        killed += net.kill(51, seed=2)
        net.mount()
        if (net.mountpoint / "file").read_bytes() != data:
            raise Failure("content differs with 51 of 80 nodes killed")
        say("51 of 80 nodes killed: identical")
        net.remount_cold()
        net.kill(1, seed=3)
        started = time.monotonic()
        try:
            (net.mountpoint / "file").read_bytes()
        except OSError as error:
            waited = time.monotonic() - started
            if waited > EIO_WITHIN_S:
                raise Failure(f"the error took {waited:.0f} s") from error
            say(f"52 of 80 nodes killed: {error.strerror} after {waited:.1f} s")
        else:
            raise Failure("a file was read from too few nodes")
        dcsfs("testnet", "revive", "--dir", str(net.directory))
        if (net.mountpoint / "file").read_bytes() != data:
            raise Failure("content differs after the nodes came back")
        say("nodes revived: identical")
        net.unmount()
    finally:
        net.close()


def main() -> int:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--big-mib", type=int, default=64)
    parser.add_argument("--whole-library", action="store_true")
    options = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="dcsfs-check-", dir="/var/tmp"))
    try:
        round_trip(base, options.big_mib, options.whole_library)
        limits(base)
    except Failure as error:
        say(f"FAILED: {error}")
        return 1
    finally:
        shutil.rmtree(base, ignore_errors=True)
    say("everything identical")
    return 0


if __name__ == "__main__":
    sys.exit(main())

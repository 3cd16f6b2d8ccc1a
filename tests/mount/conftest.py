"""Real processes: a test network of 110 nodes, mounts by mount(8), all on loopback."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


def dcsfs(*arguments, check=True, **extra):
    done = subprocess.run(
        [str(BIN / "dcsfs"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        **extra,
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


class Net:
    """A test network with helpers."""

    def __init__(self, base, nodes, redundancy):
        self.base = base
        self.directory = base / "net"
        self.grant = self.directory / "access.grant"
        dcsfs(
            "testnet", "up", "--dir", self.directory, "--nodes", nodes, "--redundancy", redundancy
        )

    def testnet(self, command, *arguments):
        return dcsfs("testnet", command, "--dir", self.directory, *arguments).stdout

    def satellite(self, command, *arguments):
        done = subprocess.run(
            [str(BIN / "dcs-satellite"), command, str(self.directory / "satellite"), *arguments],
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        return done.stdout

    def status(self):
        return json.loads(self.testnet("status", "--json"))

    def stored_bytes(self):
        return sum(node["stored_bytes"] or 0 for node in self.status()["nodes"])

    def grant_through(self, port):
        """A grant that reaches the satellite through a port of this machine (see link.py)."""
        identity = self.status()["satellite"]["address"].partition("@")[0]
        path = self.base / f"access-{port}.grant"
        dcsfs(
            "access", "create", "--satellite", f"{identity}@127.0.0.1:{port}",
            "--api-key-file", self.directory / "api.key",
            "--passphrase-file", self.directory / "passphrase", "--out", path,
        )  # fmt: skip
        return path

    def bucket(self, name):
        dcsfs("mb", "--access", self.grant, f"dcs://{name}")
        return name


class Mount:
    """One mount point with its cache directory."""

    def __init__(self, net, bucket, tag=""):
        self.net, self.bucket, self.grant = net, bucket, net.grant
        self.point = net.base / f"mnt-{bucket}{tag}"
        self.cache = net.base / f"cache-{bucket}{tag}"
        self.point.mkdir(exist_ok=True)

    def mount(self, options="", check=True):
        done = subprocess.run(
            ["mount", "-t", "dcsfs", self.bucket, str(self.point),
             "-o", f"access={self.grant},cache_dir={self.cache}{options}"],
            capture_output=True, text=True, check=False, cwd="/", timeout=120,
        )  # fmt: skip
        if check:
            assert done.returncode == 0, done.stderr
        return done

    def umount(self):
        subprocess.run(["umount", str(self.point)], check=True, timeout=200)

    def forget_cache(self):
        shutil.rmtree(self.cache)

    def status(self):
        return json.loads(dcsfs("status", "--json", self.point).stdout)

    def sync(self):
        dcsfs("sync", self.point)

    def kill(self):
        """SIGKILL the daemon and detach the dead mount point."""
        pid = self.status()["pid"]
        os.kill(pid, 9)
        subprocess.run(["umount", "-i", "-l", str(self.point)], check=True)

    def clean_up(self):
        if os.path.ismount(self.point):
            dcsfs("umount", "--detach", self.point, check=False)
        if os.path.ismount(self.point):
            subprocess.run(["umount", "-i", "-l", str(self.point)], check=False)


@pytest.fixture(scope="session")
def net():
    assert os.geteuid() == 0, "mount(8) tests need root: run scripts/test as root or with sudo"
    assert Path("/dev/fuse").exists(), "/dev/fuse is missing: FUSE is not available here"
    base = Path(tempfile.mkdtemp(prefix="dcsfs-test-", dir="/var/tmp"))
    found = Net(base, 110, "29/35/80/110")
    yield found
    dcsfs("testnet", "down", "--dir", found.directory, check=False)
    shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def mount_of(net):
    """Make mounts that are cleaned up after the test, and a network that is whole again."""
    made = []

    def make(bucket, tag=""):
        mount = Mount(net, bucket, tag)
        made.append(mount)
        return mount

    yield make
    net.testnet("revive")
    for mount in made:
        mount.clean_up()

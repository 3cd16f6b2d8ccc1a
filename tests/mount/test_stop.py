"""How a mount ends: with a progress line, within a time, as a service."""

import os
import pty
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.mount.conftest import BIN, dcsfs

MIB = 1 << 20
pytestmark = pytest.mark.mount


@pytest.fixture
def staged(net, mount_of, request):
    """A mount with a file that cannot go to the network: the satellite is down."""
    mount = mount_of(net.bucket(request.node.name.replace("_", "-")[:60]))
    mount.mount()
    (mount.point / "kept").write_bytes(b"content")
    net.testnet("kill", "--satellite")
    yield mount
    net.testnet("revive", "--satellite")


def comes_with_the_next_mount(net, mount):
    net.testnet("revive", "--satellite")
    mount.mount()
    assert mount.status()["replayed_records"]
    assert (mount.point / "kept").read_bytes() == b"content"
    mount.umount()
    mount.forget_cache()
    mount.mount()
    assert (mount.point / "kept").read_bytes() == b"content"
    mount.umount()


def test_umount_waits_so_long_and_no_longer(net, staged):
    done = dcsfs("umount", "--detach-after", "1", staged.point)
    assert "bytes wait in" in done.stderr
    assert "the next mount with this cache directory sends them" in done.stderr
    assert not staged.point.is_mount()
    comes_with_the_next_mount(net, staged)


def test_systemds_umount_is_over_before_its_patience(net, staged):
    environment = os.environ | {"INVOCATION_ID": "0" * 32, "DCSFS_UMOUNT_SECONDS": "1"}
    command = ["umount", str(staged.point)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert not staged.point.is_mount()
    comes_with_the_next_mount(net, staged)


def test_umount_of_a_bind_mount_leaves_the_mount_itself(net, mount_of):
    mount = mount_of(net.bucket("bound"))
    mount.mount()
    source, inside = mount.point / "a directory", mount.point / "in it"
    for directory in (source, inside):
        directory.mkdir()
    subprocess.run(["mount", "--bind", source, inside], check=True)
    (inside / "file").write_bytes(b"content")
    subprocess.run(["umount", inside], check=True, timeout=60)
    assert list(inside.iterdir()) == []
    assert (source / "file").read_bytes() == b"content"
    done = subprocess.run(["umount", source], capture_output=True, check=False, timeout=60)
    assert done.returncode != 0
    mount.umount()


def test_a_lazy_umount_waits_for_nothing(net, staged):
    pid = staged.status()["pid"]
    with (staged.point / "kept").open("rb") as file:
        subprocess.run(["umount", "-l", staged.point], check=True, timeout=5)
        assert not staged.point.is_mount()
        assert file.read() == b"content"
    net.testnet("revive", "--satellite")
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the daemon goes on without a mount"
        time.sleep(0.1)  # noqa: TID251 -- a test of another process
    staged.forget_cache()
    staged.mount()
    assert (staged.point / "kept").read_bytes() == b"content"
    staged.umount()


def test_umount_shows_progress_on_a_terminal(net, staged):
    ours, theirs = pty.openpty()
    command = [str(BIN / "dcsfs"), "umount", "--detach-after", "1", str(staged.point)]
    subprocess.run(command, stderr=theirs, check=True, timeout=60)
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "waiting for the network: 7 B and" in shown
    comes_with_the_next_mount(net, staged)


def test_a_service_says_when_it_is_ready_and_asks_for_time_to_stop(net, mount_of, tmp_path):
    mount = mount_of(net.bucket("service"))
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(60)
        options = f"access={net.grant},cache_dir={mount.cache}"
        command = [str(BIN / "dcsfs"), "mount", "--foreground", "-o", options]
        command += [f"dcs://{mount.bucket}", str(mount.point)]
        service = subprocess.Popen(command, env=os.environ | {"NOTIFY_SOCKET": address})
        assert manager.recv(1000).startswith(b"READY=1\n")
        assert mount.point.is_mount()
        for number in range(3):
            (mount.point / f"f{number}").write_bytes(os.urandom(40 * MIB))
        service.send_signal(signal.SIGTERM)
        assert manager.recv(1000).startswith(b"EXTEND_TIMEOUT_USEC=120000000\n")
        assert service.wait(120) == 0
    assert not mount.point.is_mount()
    mount.forget_cache()
    mount.mount()
    assert (mount.point / "f2").stat().st_size == 40 * MIB
    mount.umount()


def test_the_unit_starts_what_there_is(tmp_path):
    unit = Path(__file__).parents[2] / "scripts" / "systemd" / "dcsfs@.service"
    line = next(line for line in unit.read_text().splitlines() if line.startswith("ExecStart="))
    words = line.partition("=")[2].split()
    assert words[:3] == ["/usr/local/bin/dcsfs", "mount", "--foreground"]
    done = subprocess.run(
        [sys.executable, "-m", "dcsfs.cli.main", *words[1:3], "-o", f"access={tmp_path}/none",
         "dcs://nowhere", str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "none" in done.stderr

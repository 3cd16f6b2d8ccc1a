"""The checked behaviour of the first release on a real mount with real processes."""

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.mount.conftest import dcsfs

MIB = 1 << 20
pytestmark = pytest.mark.mount


def wait_until(condition, what, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        threading.Event().wait(0.05)


def test_overwritten_byte_sends_under_one_mib(net, mount_of):
    mount = mount_of(net.bucket("one-byte"))
    mount.mount()
    block = os.urandom(MIB)
    with (mount.point / "big").open("wb") as handle:
        for _ in range(128):
            handle.write(block)
    mount.sync()
    before, stored = mount.status()["sent_bytes"], net.stored_bytes()
    with (mount.point / "big").open("r+b") as handle:
        handle.seek(77 * MIB + 12345)
        handle.write(b"!")
    mount.sync()
    assert mount.status()["sent_bytes"] - before < MIB
    assert net.stored_bytes() - stored < MIB
    mount.umount()
    mount.forget_cache()
    mount.mount()
    with (mount.point / "big").open("rb") as handle:
        handle.seek(77 * MIB + 12345)
        assert handle.read(2) == b"!" + block[12346:12347]
    mount.umount()


def test_directory_rename_is_one_transaction(net, mount_of):
    mount = mount_of(net.bucket("rename"))
    mount.mount()
    (mount.point / "old").mkdir()
    for number in range(2000):
        (mount.point / "old" / f"file {number}").touch()
    mount.sync()
    before = mount.status()["satellite_transactions"]
    (mount.point / "old").rename(mount.point / "new")
    mount.sync()
    assert mount.status()["satellite_transactions"] - before == 1
    mount.umount()
    mount.forget_cache()
    mount.mount()
    assert len(list((mount.point / "new").iterdir())) == 2000
    assert not (mount.point / "old").exists()
    mount.umount()


def test_ten_thousand_small_files_are_packed(net, mount_of):
    mount = mount_of(net.bucket("small"))
    mount.mount()
    stored = net.stored_bytes()
    content = {}
    (mount.point / "d").mkdir()
    for number in range(10_000):
        content[f"{number}"] = os.urandom(5000)
        (mount.point / "d" / f"{number}").write_bytes(content[f"{number}"])
    mount.sync()
    status = mount.status()
    assert status["segments"] <= 3
    assert net.stored_bytes() - stored <= 3.2 * 5000 * 10_000
    mount.umount()
    mount.forget_cache()
    mount.mount()
    assert sorted(os.listdir(mount.point / "d")) == sorted(content)
    for name in list(content)[::25]:
        assert (mount.point / "d" / name).read_bytes() == content[name]
    mount.umount()


def test_markers_are_found_nowhere_at_rest(net, mount_of):
    mount = mount_of(net.bucket("secret"))
    mount.mount()
    marker = b"marker-" + os.urandom(12).hex().encode()
    name = f"name-{os.urandom(12).hex()}"
    (mount.point / name).write_bytes(marker * 5000)
    (mount.point / "link").symlink_to(f"target-{name}")
    os.setxattr(mount.point / name, f"user.x-{name}", b"value-" + marker)
    with (mount.point / name).open("r+b") as handle:
        os.fsync(handle.fileno())
    places = [net.directory / "satellite", net.directory / "nodes", mount.cache]
    for _ in range(2):  # staged only, then on the network
        for text in (marker, name.encode()):
            found = subprocess.run(
                ["grep", "-rlaF", text.decode(), *map(str, places)],
                capture_output=True,
                check=False,
            )
            assert found.returncode == 1, found.stdout
        mount.sync()
    assert mount.status()["segments"] == 1
    mount.umount()


def test_corrupt_node_is_named_and_reads_succeed(net, mount_of):
    mount = mount_of(net.bucket("corrupt"))
    mount.mount()
    data = os.urandom(20 * MIB)
    (mount.point / "f").write_bytes(data)
    mount.sync()
    mount.umount()
    mount.forget_cache()
    found = json.loads(dcsfs("stat", "--json", "--access", net.grant, "dcs://corrupt/f").stdout)
    segment = next(iter(found["segments"].values()))
    bad = segment["pieces"]["3"]["node"]  # a data index: every whole read meets it
    net.testnet("corrupt", "--node", bad)
    mount.mount()
    assert (mount.point / "f").read_bytes() == data
    assert bad in mount.status()["bad_nodes"]
    satellite = subprocess.run(
        [str(dcs_satellite()), "status", "--json", str(net.directory / "satellite")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert bad in json.loads(satellite.stdout)["bad_nodes"]
    mount.umount()


def dcs_satellite():
    from tests.mount.conftest import BIN

    return BIN / "dcs-satellite"


def timed_upload(mount, name):
    data = os.urandom(48 * MIB)
    started = time.monotonic()
    (mount.point / name).write_bytes(data)
    mount.sync()
    return time.monotonic() - started


def test_uploads_past_bad_nodes_take_at_most_twice_as_long(net, mount_of):
    mount = mount_of(net.bucket("slow"))
    mount.mount()
    undisturbed = sorted(timed_upload(mount, f"calm {n}") for n in range(3))[1]
    limit = max(2 * undisturbed, undisturbed + 1.0)  # a second of noise on a busy machine
    names = [node["id"] for node in net.status()["nodes"]]
    for fault in ("stall", "slow=10"):
        net.testnet("fault", "--node", names[5], fault)
        took = sorted(timed_upload(mount, f"{fault} {n}") for n in range(3))[1]
        net.testnet("fault", "--node", names[5], "none")
        assert took <= limit, (fault, took, undisturbed)
    net.testnet("kill", "--count", "30", "--seed", "7")
    took = timed_upload(mount, "dead")
    assert took <= limit, ("30 dead", took, undisturbed)
    mount.umount()


def test_kill_9_right_after_fsync_loses_nothing(net, mount_of):
    mount = mount_of(net.bucket("crash"))
    mount.mount()
    (mount.point / "before").write_bytes(b"committed")
    mount.sync()
    net.testnet("kill", "--satellite")
    data = os.urandom(3 * MIB + 17)
    (mount.point / "dir").mkdir()
    with (mount.point / "dir" / "tmp").open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    (mount.point / "dir" / "tmp").rename(mount.point / "after")
    descriptor = os.open(mount.point, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    mount.kill()
    net.testnet("revive")
    mount.mount()
    assert (mount.point / "after").read_bytes() == data
    assert (mount.point / "before").read_bytes() == b"committed"
    mount.umount()
    mount.forget_cache()
    mount.mount()
    assert (mount.point / "after").read_bytes() == data
    assert sorted(os.listdir(mount.point)) == ["after", "before", "dir"]
    assert os.listdir(mount.point / "dir") == []
    mount.umount()


def forget_pages(path):
    """Drop a file's pages from the kernel's cache, so that the next read asks the mount."""
    with path.open("rb") as handle:
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_satellite_down_cached_reads_and_staged_writes_go_on(net, mount_of):
    mount = mount_of(net.bucket("offline"))
    mount.mount()
    warm, cold = os.urandom(2 * MIB), os.urandom(2 * MIB)
    (mount.point / "warm").write_bytes(warm)
    (mount.point / "cold").write_bytes(cold)
    mount.umount()
    mount.forget_cache()
    mount.mount()
    assert (mount.point / "warm").read_bytes() == warm
    net.testnet("kill", "--satellite")
    forget_pages(mount.point / "warm")
    assert (mount.point / "warm").read_bytes() == warm
    (mount.point / "new").write_bytes(b"staged")
    assert (mount.point / "new").read_bytes() == b"staged"
    started = time.monotonic()
    with pytest.raises(OSError, match="Input/output error"):
        (mount.point / "cold").read_bytes()
    assert time.monotonic() - started < 40
    net.testnet("revive")
    mount.sync()
    assert (mount.point / "cold").read_bytes() == cold
    assert mount.status()["dirty_bytes"] == 0
    mount.umount()
    mount.forget_cache()
    mount.mount()
    assert (mount.point / "new").read_bytes() == b"staged"
    mount.umount()


def test_mount_options_are_honoured(net, mount_of):
    mount = mount_of(net.bucket("options"))
    mount.mount(",noatime,dev,suid,_netdev,nofail")
    lines = Path("/proc/mounts").read_text().splitlines()
    line = next(x for x in lines if str(mount.point) in x)
    assert " fuse.dcsfs " in line
    assert "noatime" in line
    assert "nosuid" not in line
    (mount.point / "f").write_text("x")
    with (mount.point / "f").open("r+"):
        busy = subprocess.run(
            ["mount", "-o", "remount,ro", str(mount.point)],
            check=False, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert busy.returncode != 0
        assert "busy" in busy.stderr
        (mount.point / "still-writable").write_text("x")
    subprocess.run(["mount", "-o", "remount,ro", str(mount.point)], check=True, timeout=60)
    with pytest.raises(OSError, match="Read-only"):
        (mount.point / "g").write_text("x")
    mount.umount()
    mount.mount(",stock_wait")
    assert (mount.point / "f").read_text() == "x"
    (mount.point / "h").write_bytes(bytes(3 * MIB))
    assert (mount.point / "h").read_bytes() == bytes(3 * MIB)
    mount.umount()
    mount.mount(",ro")
    assert (mount.point / "f").read_text() == "x"
    with pytest.raises(OSError, match="Read-only"):
        (mount.point / "g").write_text("x")
    mount.umount()


def test_exclusive_mount_uses_the_kernels_write_back_cache(net, mount_of):
    mount = mount_of(net.bucket("exclusive"))
    mount.mount(",exclusive")
    data = os.urandom(5 * MIB + 77)
    with (mount.point / "f").open("wb", buffering=0) as handle:
        for start in range(0, len(data), 4096):
            handle.write(data[start : start + 4096])
    assert (mount.point / "f").stat().st_size == len(data)
    mount.umount()
    mount.forget_cache()
    mount.mount()
    assert (mount.point / "f").read_bytes() == data
    mount.umount()


def test_sync_takes_what_the_kernel_still_holds(net, mount_of):
    bucket = net.bucket("held")
    mount, reader = mount_of(bucket), mount_of(bucket, "-ro")
    mount.mount(",exclusive")
    with (mount.point / "open").open("wb", buffering=0) as handle:
        for number in range(50):
            handle.write(b"%4096d" % number)
        mount.sync()
        assert mount.status()["dirty_bytes"] == 0
        reader.mount(",ro")
        expected = b"".join(b"%4096d" % number for number in range(50))
        assert (reader.point / "open").read_bytes() == expected
    reader.umount()
    mount.umount()


def test_sigterm_unmounts_and_flushes(net, mount_of):
    mount = mount_of(net.bucket("sigterm"))
    mount.mount()
    (mount.point / "f").write_bytes(b"staged only")
    pid = mount.status()["pid"]
    os.kill(pid, 15)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the daemon's end")
    assert not os.path.ismount(mount.point)
    assert dcsfs("cat", "--access", net.grant, "dcs://sigterm/f").stdout == "staged only"
    mount.forget_cache()
    mount.mount()
    assert (mount.point / "f").read_bytes() == b"staged only"
    mount.umount()


def test_subtree_mount_shows_only_the_subtree(net, mount_of):
    mount = mount_of(net.bucket("subtree"))
    mount.mount()
    (mount.point / "a" / "b").mkdir(parents=True)
    (mount.point / "a" / "b" / "f").write_text("deep")
    mount.umount()
    inner = mount_of("subtree/a/b".replace("/", "-"))
    inner.bucket = "subtree/a/b"
    inner.mount()
    assert os.listdir(inner.point) == ["f"]
    assert (inner.point / "f").read_text() == "deep"
    inner.umount()


def refused(*arguments, **extra):
    """A command must fail with a sentence and exit 1 or 2, never with a traceback."""
    done = dcsfs(*arguments, check=False, **extra)
    assert done.returncode in (1, 2), done
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip()) > 10
    return done.stderr


def test_bad_input_gets_a_sentence_and_an_exit_code(net, mount_of, tmp_path):
    bucket = net.bucket("input")
    (tmp_path / "bad.grant").write_text("dcs1AAAA")
    (tmp_path / "noise.grant").write_bytes(os.urandom(100))
    assert "damaged" in refused("ls", "--access", tmp_path / "bad.grant")
    refused("ls", "--access", tmp_path / "noise.grant")
    refused("ls", "--access", tmp_path / "missing.grant")
    assert "does not exist" in refused("ls", "--access", net.grant, "dcs://no-such-bucket")
    assert "bucket name" in refused("mb", "--access", net.grant, "dcs://NO")
    assert "exists" in refused("mb", "--access", net.grant, f"dcs://{bucket}")
    refused("cp", "--access", net.grant, "a", "b")
    refused("cp", "--access", net.grant, "/no/such/file", f"dcs://{bucket}/x")
    refused("cat", "--access", net.grant, f"dcs://{bucket}/../x")
    refused("cat", "--access", net.grant, f"dcs://{bucket}/nothing")
    refused("cat", "--access", net.grant, "--range", "9-3", f"dcs://{bucket}/nothing")
    refused("status", tmp_path)
    refused("testnet", "status", "--dir", tmp_path)
    refused("testnet", "up", "--dir", tmp_path / "t", "--nodes", "5")
    refused("testnet", "up", "--dir", tmp_path / "t", "--redundancy", "9/8/7/6")
    point = tmp_path / "point"
    refused("mount", "--access", net.grant, f"dcs://{bucket}", point)
    point.mkdir()
    assert "unknown" in refused(
        "mount", "--access", net.grant, "-o", "nonsense", f"dcs://{bucket}", point
    )
    refused("mount", "--access", net.grant, "-o", "cache_size=1", f"dcs://{bucket}", point)
    refused("mount", "--access", net.grant, "dcs://no-such-bucket", point)
    mount = mount_of(bucket)
    mount.mount()
    assert "already" in mount.mount(check=False).stderr
    other = mount_of(bucket, "-second")
    assert "exclusive" in other.mount(",exclusive", check=False).stderr
    other.cache = mount.cache
    assert "in use" in other.mount(check=False).stderr
    with pytest.raises(ValueError, match="null"):
        (mount.point / "a\0b").touch()
    with pytest.raises(OSError, match="too long"):
        (mount.point / ("x" * 256)).touch()
    (mount.point / ("x" * 255)).touch()
    mount.umount()


def test_wrong_passphrase_is_a_clear_error(net, tmp_path):
    net.bucket("passphrase")
    (tmp_path / "passphrase").write_text("not the one")
    address = net.status()["satellite"]["address"]
    error = refused(
        "access", "create", "--satellite", address, "--api-key-file", net.directory / "api.key",
        "--passphrase-file", tmp_path / "passphrase", "--out", tmp_path / "grant",
    )  # fmt: skip
    assert "wrong passphrase" in error
    assert not (tmp_path / "grant").exists()


def test_satellite_unreachable_is_a_clear_error(net):
    net.testnet("kill", "--satellite")
    try:
        assert "cannot connect" in refused("ls", "--access", net.grant)
    finally:
        net.testnet("revive")


def test_garbage_on_every_port_harms_nobody(net):
    import socket

    status = net.status()
    places = [node["address"] for node in status["nodes"][:6]]
    places.append(status["satellite"]["address"].partition("@")[2])
    for place in places:
        host, _, port = place.rpartition(":")
        for garbage in (
            b"",
            b"GET / HTTP/1.0\r\n\r\n",
            os.urandom(4096),
            b"DCS\x01\x00\x20" + os.urandom(32),
        ):
            with socket.create_connection((host, int(port)), 5) as sock:
                sock.settimeout(5)
                try:
                    sock.sendall(garbage)
                    sock.shutdown(socket.SHUT_WR)
                    while sock.recv(4096):
                        pass
                except OSError as error:  # it may hang up at any point, but must not hang
                    if error.errno not in (errno.ENOTCONN, errno.EPIPE, errno.ECONNRESET):
                        raise
    again = net.status()
    assert all(node["state"] == "up" for node in again["nodes"])
    dcsfs("ls", "--access", net.grant)


def test_full_cache_disk_is_enospc_not_loss(net, mount_of, tmp_path):
    image = tmp_path / "disk"
    small = tmp_path / "small"
    small.mkdir()
    with image.open("wb") as handle:
        handle.truncate(200 * MIB)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(small)], check=True)
    try:
        mount = mount_of(net.bucket("full"))
        mount.cache = small / "cache"
        mount.mount()
        net.testnet("kill", "--satellite")
        written = b""
        error = ""
        with (mount.point / "f").open("wb", buffering=0) as handle:
            while not error:
                block = os.urandom(MIB)
                try:
                    handle.write(block)
                    written += block
                except OSError as caught:
                    error = caught.strerror
        assert error == "No space left on device"
        assert len(written) >= 64 * MIB
        net.testnet("revive")
        mount.sync()
        assert (mount.point / "f").read_bytes() == written
        mount.umount()
    finally:
        for made in (mount.point,):
            subprocess.run(["umount", "-i", "-l", str(made)], check=False, capture_output=True)
        subprocess.run(["umount", "-l", str(small)], check=False)


def test_stored_bytes_of_a_node_match_its_disk(net, mount_of):
    mount = mount_of(net.bucket("accounting"))
    mount.mount()
    (mount.point / "f").write_bytes(os.urandom(10 * MIB))
    mount.umount()
    for node in net.status()["nodes"][:5]:
        database = sqlite3.connect(f"file:{node['storage_dir']}/index.db?mode=ro", uri=True)
        bodies = database.execute("SELECT coalesce(sum(body_bytes), 0) FROM piece").fetchone()[0]
        database.close()
        on_disk = sum(
            path.stat().st_size for path in (shutil.os.scandir(f"{node['storage_dir']}/pieces"))
        )
        assert bodies <= node["stored_bytes"] <= bodies + 4096 * max(1, node["pieces"])
        assert node["stored_bytes"] <= on_disk <= node["stored_bytes"] + 8192 * (node["pieces"] + 8)


CAP_SYS_RESOURCE = 24


def test_the_daemon_is_the_last_to_be_killed_for_memory(net, mount_of):
    mount = mount_of(net.bucket("shielded"))
    mount.mount()
    process = Path(f"/proc/{mount.status()['pid']}")
    capabilities = next(
        int(line.split()[1], 16)
        for line in (process / "status").read_text().splitlines()
        if line.startswith("CapEff")
    )
    is_allowed = capabilities >> CAP_SYS_RESOURCE & 1
    before = Path("/proc/self/oom_score_adj").read_text()
    after = (process / "oom_score_adj").read_text()
    assert after == ("-500\n" if is_allowed else before)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cap = max(memory // 2, 2 << 30)
    limits = (process / "limits").read_text().splitlines()
    assert next(line.split()[3] for line in limits if line.startswith("Max data")) == str(cap)
    mount.umount()

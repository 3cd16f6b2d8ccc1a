"""Two mounts of one bucket, now one, now the other cut off from the satellite."""

import concurrent.futures
import contextlib
import errno
import os
import random
import time

import pytest

from tests.crash.link import Link
from tests.mount.conftest import Mount
from tests.mount.test_two_mounts import Steps, outcome, snapshot

pytestmark = pytest.mark.crash


def link_to_satellite(net):
    host, _, port = net.status()["satellite"]["address"].rpartition("@")[2].partition(":")
    return Link((host, int(port)))


def outcome_of_reading(root):
    """Read everything; what cannot be had is EIO, and the answer comes in time."""
    started = time.monotonic()
    try:
        snapshot(root)
    except OSError as error:
        assert error.errno in (errno.EIO, errno.ENOENT), error  # noqa: PT017 -- either is right
    return time.monotonic() - started


def wait_for_sight_of(wanted, point, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if snapshot(point) == wanted:
                return
        time.sleep(0.2)
    assert snapshot(point) == wanted


@pytest.mark.parametrize("seed", [1])
def test_random_schedule_with_partitions(small_net, tmp_path, seed):
    net, bucket = small_net, small_net.bucket("parted")
    links = [link_to_satellite(net) for _ in range(2)]
    mounts = [Mount(net, bucket), Mount(net, bucket, "-b")]
    for mount, link in zip(mounts, links, strict=True):
        mount.grant = net.grant_through(link.port)
        mount.mount()
    reference = tmp_path / "reference"
    reference.mkdir()
    steps, chance = Steps(seed), random.Random(seed)
    for number in range(120):
        cut = number // 30 % 2
        mount, other, link = mounts[1 - cut], mounts[cut], links[cut]
        kind, action = steps.draw()
        if number % 30 == 10:
            # What is open goes on: staged where it was written, committed when it can be.
            (reference / f"log {number}").write_bytes(b"begun")
            (other.point / f"log {number}").write_bytes(b"begun")
            log = (other.point / f"log {number}").open("ab", buffering=0)
            link.is_cut = True
            log.write(b" and ended")
            os.fsync(log.fileno())
            (reference / f"log {number}").write_bytes(b"begun and ended")
        started = time.monotonic()
        expected, found = outcome(action, reference), outcome(action, mount.point)
        assert found == expected, (number, kind)
        assert time.monotonic() - started < 20, (number, kind)  # 8 s for who does not answer
        if number % 30 == 15:
            with concurrent.futures.ThreadPoolExecutor() as pool:
                assert pool.submit(outcome_of_reading, other.point).result(timeout=90) < 60
        if number % 30 == 20:
            link.is_cut = False
            log.close()
        if not link.is_cut:
            wanted = snapshot(reference)
            for each in chance.sample(mounts, 2):
                wait_for_sight_of(wanted, each.point, 30 if number % 30 == 20 else 0)
    for mount, link in zip(mounts, links, strict=True):
        mount.umount()
        link.close()


def test_names_the_kernel_had_under_a_lease_that_was_lost(small_net):
    net, bucket = small_net, small_net.bucket("lostnames")
    link = link_to_satellite(net)
    mount, other = Mount(net, bucket), Mount(net, bucket, "-b")
    mount.grant = net.grant_through(link.port)
    mount.mount()
    for name in ("replaced", "removed"):
        (mount.point / name).write_bytes(b"old")
    (mount.point / "directory").mkdir()
    (mount.point / "directory" / "inside").write_bytes(b"old")
    mount.sync()
    wanted = snapshot(mount.point)
    link.is_cut = True
    other.mount()  # takes the lease after the recall's deadline
    assert snapshot(other.point) == wanted
    (other.point / "new").write_bytes(b"new")
    (other.point / "new").rename(other.point / "replaced")
    (other.point / "removed").unlink()
    (other.point / "directory").rename(other.point / "elsewhere")
    link.is_cut = False
    until = time.monotonic() + 40

    def is_seen():  # without listing the directory, which would tell the kernel
        return (
            (mount.point / "replaced").read_bytes() == b"new"
            and not (mount.point / "removed").exists()
            and not (mount.point / "directory" / "inside").exists()
        )

    while not is_seen() and time.monotonic() < until:
        time.sleep(0.2)
    assert is_seen()
    assert snapshot(mount.point) == snapshot(other.point)
    for each in (mount, other):
        each.umount()
    link.close()

"""Several processes at random work in one tree; what they leave is what a fresh mount finds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount.conftest import Mount
from tests.mount.test_two_mounts import snapshot

WORKERS = 6
pytestmark = pytest.mark.crash


def links_are_right(root):
    """A directory's links are 2 and one for each directory in it; a file's are its names."""
    names = {}
    for base, directories, files in os.walk(root):
        inner = [name for name in directories if not os.path.islink(os.path.join(base, name))]
        assert os.lstat(base).st_nlink == 2 + len(inner), base
        for name in {*files, *directories} - set(inner):
            info = os.lstat(os.path.join(base, name))
            names.setdefault(info.st_ino, (info.st_nlink, []))[1].append(name)
    for links, found in names.values():
        assert links == len(found), found


def work(points, operations):
    """Have WORKERS processes work in these mount points by turns, each at so many operations."""
    program = str(Path(__file__).with_name("stress.py"))
    workers = [
        subprocess.Popen(
            [sys.executable, program, points[seed % len(points)], str(seed), str(operations)],
            stdout=subprocess.PIPE, text=True,
        )
        for seed in range(WORKERS)
    ]  # fmt: skip
    done = [worker.communicate(timeout=500)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * WORKERS
    assert all(int(count) > operations / 5 for count in done), done


@pytest.mark.parametrize("options", ["", ",exclusive"])
def test_what_many_processes_leave_is_what_is_kept(small_net, options):
    mount = Mount(small_net, small_net.bucket("stress"))
    mount.mount(options)
    work([str(mount.point)], 2500)
    links_are_right(mount.point)
    left = snapshot(mount.point)
    assert len(left[0]) > 50
    mount.umount()
    mount.forget_cache()
    mount.mount(options)
    assert snapshot(mount.point) == left
    links_are_right(mount.point)
    mount.umount()


def test_two_mounts_at_random_work_agree_on_what_is_left(small_net):
    bucket = small_net.bucket("stress-shared")
    one, two = Mount(small_net, bucket), Mount(small_net, bucket, "-2")
    one.mount()
    two.mount()
    work([str(one.point), str(two.point)], 800)
    left = snapshot(one.point)
    assert len(left[0]) > 50
    assert snapshot(two.point) == left
    links_are_right(one.point)
    for mount in (one, two):
        mount.umount()
    one.forget_cache()
    one.mount()
    assert snapshot(one.point) == left
    links_are_right(one.point)
    one.umount()

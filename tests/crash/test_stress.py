"""Several processes at random work in one tree; what they leave is what a fresh mount finds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount.conftest import Mount
from tests.mount.test_two_mounts import snapshot

WORKERS, OPERATIONS = 6, 2500
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


@pytest.mark.parametrize("options", ["", ",exclusive"])
def test_what_many_processes_leave_is_what_is_kept(small_net, options):
    mount = Mount(small_net, small_net.bucket("stress"))
    mount.mount(options)
    program = str(Path(__file__).with_name("stress.py"))
    workers = [
        subprocess.Popen(
            [sys.executable, program, str(mount.point), str(seed), str(OPERATIONS)],
            stdout=subprocess.PIPE, text=True,
        )
        for seed in range(WORKERS)
    ]  # fmt: skip
    done = [worker.communicate(timeout=500)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * WORKERS
    assert all(int(count) > OPERATIONS / 5 for count in done), done
    links_are_right(mount.point)
    left = snapshot(mount.point)
    assert len(left[0]) > 50
    mount.umount()
    mount.forget_cache()
    mount.mount(options)
    assert snapshot(mount.point) == left
    links_are_right(mount.point)
    mount.umount()

"""The real daemon gets SIGKILL under load, again and again; nothing that fsync promised is lost."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.crash.manifest import Manifest
from tests.mount.conftest import Mount

ROUNDS = 200
pytestmark = pytest.mark.crash


def kill_under_load(mount, manifest, seed, begun):
    """Run the writer, kill the daemon once it has begun so many operations, detach the mount."""
    pid = mount.status()["pid"]
    writer = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("writer.py")), str(mount.point), str(seed)],
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = threading.Timer(120, writer.kill)  # ends the loop below, and then the test
    deadline.start()
    for line in writer.stdout:
        manifest.note(line)
        begun -= json.loads(line)[0] == "begin"
        if begun == 0:
            begun = -1
            os.kill(pid, signal.SIGKILL)
    deadline.cancel()
    assert begun < 0, "the writer ended by itself"
    assert writer.wait(timeout=60) == 0, "the writer hung"
    writer.stdout.close()
    subprocess.run(["umount", "-i", "-l", str(mount.point)], check=True, timeout=60)


def test_killed_under_load_keeps_every_promise(small_net):
    chosen = random.Random(7)
    mount, manifest = Mount(small_net, small_net.bucket("killed")), Manifest()
    for number in range(ROUNDS):
        mount.mount()
        manifest.check(mount.point)
        if number % 8 == 5:
            small_net.testnet("kill", "--satellite")
        kill_under_load(mount, manifest, number, chosen.randrange(1, 80))
        if number % 8 == 5:
            small_net.testnet("revive")
    mount.mount()
    manifest.check(mount.point)
    assert manifest.operations > 10 * ROUNDS
    mount.umount()
    mount.forget_cache()
    mount.mount()
    manifest.check(mount.point)
    mount.umount()

"""The power of a machine with mount, satellite and nodes is cut; fsync has kept its word."""

import json
import random
import threading

import pytest

from tests.crash.manifest import Manifest

ROUNDS = 6
pytestmark = pytest.mark.power

MOUNT = """
exec 2>>{shared}/log
dcsfs testnet up --dir /tmp/disk/net --nodes 10 --redundancy 4/6/8/10 --processes 1 >&2
export DCSFS_ACCESS=/tmp/disk/net/access.grant
[ -e /tmp/disk/made ] || {{ dcsfs mb dcs://lab && touch /tmp/disk/made && sync; }}
mounted() {{ dcsfs mount dcs://lab /tmp/mount -o cache_dir=/tmp/disk/{cache}; }}
mounted || mounted || mounted || {{ touch {shared}/failed; sleep 1000; }}
python -m tests.crash.manifest /tmp/mount >{shared}/found.new && sync
mv {shared}/found.new {shared}/found
"""
WRITE = """
( while true; do dcsfs sync /tmp/mount; done ) >&2 &
python tests/crash/writer.py /tmp/mount {seed} >{shared}/lines
"""
WAIT = "sleep 1000\n"
END = "dcsfs umount /tmp/mount && touch {shared}/ended\n"


def lines_of(machine):
    """What the writer has said, as far as it has been said."""
    path = machine.shared / "lines"
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def found_by(machine):
    found, failed = machine.shared / "found", machine.shared / "failed"
    machine.wait_until(lambda: found.exists() or failed.exists(), 200, "the mount was read")
    assert not failed.exists(), (machine.shared / "log").read_text(errors="replace")
    return json.loads((machine.shared / "found").read_text())


def test_every_promise_outlives_the_power(machine):
    chosen, manifest = random.Random(11), Manifest()
    for number in range(ROUNDS):
        script = (MOUNT + WRITE).format(shared=machine.shared, seed=number, cache="cache")
        if number % 5 == 4:
            # While nothing new is written: starting, replaying, mounting.
            machine.power_on(MOUNT.format(shared=machine.shared, cache="cache") + WAIT)
            threading.Event().wait(chosen.uniform(5, 25))
            machine.cut_power()
        machine.power_on(script)
        manifest.compare(found_by(machine))
        count = chosen.randrange(2, 160)
        machine.wait_until(lambda at=count: len(lines_of(machine)) >= at, 200, f"{count} lines")
        threading.Event().wait(chosen.uniform(0, 0.2))
        machine.cut_power()
        for line in lines_of(machine):
            manifest.note(line)
    for cache in ("cache", "fresh"):
        machine.power_on((MOUNT + END).format(shared=machine.shared, cache=cache))
        manifest.compare(found_by(machine))
        machine.wait_until((machine.shared / "ended").exists, 200, "unmounted")
        machine.cut_power()
    assert manifest.operations > 20 * ROUNDS

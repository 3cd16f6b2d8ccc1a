"""The sentences of docs/semantics.md on several mounts. A docstring is the sentence it shows."""

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.mount import test_semantics
from tests.mount.conftest import Mount
from tests.mount.test_semantics import MIB, run

PROMISES = Path(__file__).parents[2] / "docs" / "semantics.md"


@pytest.fixture
def pair(net, request):
    """Two mounts of one bucket, the second still to be mounted."""
    bucket = net.bucket(request.node.name.replace("_", "-"))
    first, second = Mount(net, bucket), Mount(net, bucket, "-second")
    first.mount()
    yield first, second
    for mount in (second, first):
        mount.clean_up()


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)  # noqa: TID251 -- another process is waited for


def test_exclusive(pair):
    """With -o exclusive a second read-write mount is refused, naming host and process."""
    first, second = pair
    first.umount()
    first.mount(",exclusive")
    done = second.mount(check=False)
    assert done.returncode != 0
    assert os.uname().nodename in done.stderr
    assert f"process {first.status()['pid']}" in done.stderr
    second.mount(",ro")
    assert second.point.is_mount()


def test_recall(pair):
    """A second mount sees names at once, and content that is still staged when it has been sent."""
    first, second = pair
    data = os.urandom(40 * MIB)
    (first.point / "directory").mkdir()
    (first.point / "directory" / "big").write_bytes(data)
    (first.point / "old").write_text("as it was")
    (first.point / "old").rename(first.point / "renamed")
    started = time.monotonic()
    second.mount()
    assert os.listdir(second.point / "directory") == ["big"]
    assert (second.point / "renamed").exists()
    assert time.monotonic() - started < 10
    wait_until(lambda: (second.point / "directory" / "big").stat().st_size == len(data))
    assert (second.point / "directory" / "big").read_bytes() == data


def test_visible_at_once(pair):
    """What one mount has changed the other one shows as soon as the call has returned."""
    first, second = pair
    second.mount()
    a, b = first.point, second.point
    for number in range(10):
        (a / "f").touch()
        assert (b / "f").exists()
        (b / "f").chmod(0o600 + number)
        assert (a / "f").stat().st_mode & 0o777 == 0o600 + number
        os.utime(a / "f", ns=(number, number))
        assert (b / "f").stat().st_mtime_ns == number
        os.setxattr(b / "f", "user.n", b"%d" % number)
        assert os.getxattr(a / "f", "user.n") == b"%d" % number
        (a / "f").rename(a / "g")
        assert os.listdir(b) == ["g"]
        os.link(b / "g", b / "h")
        assert (a / "g").stat().st_nlink == 2
        (a / "d").mkdir()
        assert (b).stat().st_nlink == 3
        (b / "d").rmdir()
        (b / "g").unlink()
        assert not (a / "g").exists()
        (a / "h").unlink()
        assert os.listdir(b) == []


def test_close_to_open(pair):
    """What was written before close is what the other mount reads after open."""
    first, second = pair
    second.mount()
    for number in range(20):
        writer, reader = (first, second)[:: 1 if number % 2 else -1]
        data = os.urandom(1 + 37_000 * number)
        (writer.point / "f").write_bytes(data)
        assert (reader.point / "f").read_bytes() == data
        with (reader.point / "f").open("r+b") as handle:
            assert handle.read(10) == data[:10]
            with (writer.point / "f").open("r+b") as other:
                other.write(b"X")
            handle.seek(0)
            assert os.pread(handle.fileno(), 1, 0) == b"X"  # open files too


def test_excl_on_two_mounts(pair):
    """Of processes on two mounts that create one name with O_EXCL, exactly one succeeds."""
    first, second = pair
    second.mount()
    program = (
        "import os,sys\n"
        "won = []\n"
        "for n in range(40):\n"
        "    try: os.close(os.open(f'{sys.argv[1]}/{n}', os.O_CREAT | os.O_EXCL)); won.append(n)\n"
        "    except FileExistsError: pass\n"
        "print(won)"
    )
    with concurrent.futures.ThreadPoolExecutor() as pool:
        points = [first.point, second.point] * 2
        won = [json.loads(text) for text in pool.map(lambda p: run(program, p), points)]
    assert sorted(number for part in won for number in part) == list(range(40))


def test_attributes_on_two_mounts(pair):
    """The same holds for extended attributes that are set with XATTR_CREATE."""
    first, second = pair
    second.mount()
    (first.point / "f").touch()
    program = (
        "import os,sys\n"
        "won = []\n"
        "for n in range(40):\n"
        "    try: os.setxattr(sys.argv[1], f'user.{n}', b'', os.XATTR_CREATE); won.append(n)\n"
        "    except FileExistsError: pass\n"
        "print(won)"
    )
    with concurrent.futures.ThreadPoolExecutor() as pool:
        files = [first.point / "f", second.point / "f"] * 2
        won = [json.loads(text) for text in pool.map(lambda p: run(program, p), files)]
    assert sorted(number for part in won for number in part) == list(range(40))


def test_two_writers(pair):
    """Two mounts that write different parts of one file both keep what they wrote."""
    first, second = pair
    second.mount()
    (first.point / "f").write_bytes(bytes(8 * MIB))
    with (first.point / "f").open("r+b") as a, (second.point / "f").open("r+b") as b:
        for number in range(0, 8, 2):
            os.pwrite(a.fileno(), b"a" * 1000, number * MIB)
            os.pwrite(b.fileno(), b"b" * 1000, (number + 1) * MIB)
    expected = b"".join((b"a", b"b")[number % 2] * 1000 + bytes(MIB - 1000) for number in range(8))
    assert (first.point / "f").read_bytes() == expected
    assert (second.point / "f").read_bytes() == expected


def test_at_work(pair):
    """Programs at work keep their working directory, and mounts below, when another one comes."""
    first, second = pair
    work = first.point / "a" / "b"
    (work / "tmpfs").mkdir(parents=True)
    (work / "file").write_text("content")
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(work / "tmpfs")], check=True)
    (work / "tmpfs" / "inside").write_text("x")
    program = (
        "import os, sys\n"
        "os.chdir(sys.argv[1]); os.listdir('.'); os.stat('file'); handle = open('file')\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "assert os.getcwd() == sys.argv[1], os.getcwd()\n"
        "assert os.readlink(f'/proc/self/fd/{handle.fileno()}') == sys.argv[1] + '/file'\n"
        "assert handle.read() == open('file').read() == 'content'\n"
        "open('new', 'w').close(); print('well')"
    )
    command = [sys.executable, "-c", program, str(work)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as worker:
        threading.Timer(60, worker.kill).start()
        assert worker.stdout.readline() == "ready\n"
        second.mount()
        assert (work / "tmpfs" / "inside").exists()
        assert worker.communicate("go\n")[0] == "well\n"
    (second.point / "a" / "b" / "file").unlink()  # what was known is asked for again
    assert not (work / "file").exists()
    subprocess.run(["umount", str(work / "tmpfs")], check=True)


def test_removed_elsewhere(pair):
    """An open file that the other mount has removed can still be read."""
    first, second = pair
    second.mount()
    data = os.urandom(3 * MIB)
    (first.point / "f").write_bytes(data)
    with (second.point / "f").open("rb") as handle:
        (first.point / "f").unlink()
        assert not (second.point / "f").exists()
        assert handle.read() == data
        assert os.fstat(handle.fileno()).st_nlink == 0


def test_lease_returns(pair):
    """The last mount gets the lease back and works alone again."""
    first, second = pair
    second.mount()
    (second.point / "f").write_text("theirs")
    assert first.status()["shared"]
    second.umount()
    wait_until(lambda: not first.status()["shared"])
    before = first.status()["satellite_transactions"]
    (first.point / "g").write_text("mine")
    assert first.status()["satellite_transactions"] == before
    assert sorted(os.listdir(first.point)) == ["f", "g"]
    assert (first.point / "f").read_text() == "theirs"


def test_away(pair):
    """Changes of a mount that was away too long stay, as NAME (conflict HOST TIME) if need be."""
    first, second = pair
    (first.point / "f").write_text("base")
    first.sync()
    (first.point / "f").write_text("mine")
    (first.point / "g").write_text("also mine")
    (first.point / "mine alone").write_text("untouched")
    pid = first.status()["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        second.mount()
        (second.point / "f").write_text("theirs")
        (second.point / "g").write_text("also theirs")
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: (second.point / "mine alone").exists())
    wait_until(lambda: len(os.listdir(second.point)) == 5)
    assert (second.point / "f").read_text() == "theirs"
    assert (second.point / "g").read_text() == "also theirs"
    copies = sorted(name for name in os.listdir(first.point) if "(conflict" in name)
    mark = f" (conflict {os.uname().nodename[:40]} "
    assert [name.split(mark)[0] for name in copies] == ["f", "g"]
    for point in (first.point, second.point):
        wait_until(lambda at=point: (at / copies[0]).read_text() == "mine")
        wait_until(lambda at=point: (at / copies[1]).read_text() == "also mine")
    assert first.status()["conflicts"]


def test_every_sentence_has_its_test():
    """Not a promise: the page and this module say the same."""
    promised = [
        line[2:].strip() for line in PROMISES.read_text().splitlines() if line.startswith("- ")
    ]
    shown = [
        function.__doc__
        for name, function in [*vars(test_semantics).items(), *globals().items()]
        if name.startswith("test_") and callable(function)
    ]
    assert promised == [sentence for sentence in shown if not sentence.startswith("Not a promise")]

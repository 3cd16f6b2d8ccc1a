"""Real programs on a real mount: each does its work and its own verification passes."""

import contextlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

pytestmark = pytest.mark.programs
MIB = 1 << 20


def run(*command, cwd=None, check=True, **environment):
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **{key: str(value) for key, value in environment.items()}},
    )
    if check:
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """About 60 MB in 1,500 files, of every kind a backup meets."""
    root = tmp_path_factory.mktemp("source")
    for number in range(30):
        directory = root / f"directory {number}"
        directory.mkdir()
        for item in range(50):
            (directory / f"file-{item}.txt").write_bytes(os.urandom(200 + 90 * item))
    big = root / "big"
    big.mkdir()
    for number in range(5):
        (big / f"random-{number}").write_bytes(os.urandom(9 * MIB + number))
    (big / "zeros").write_bytes(bytes(8 * MIB))
    with (big / "sparse").open("wb") as handle:
        handle.seek(64 * MIB)
        handle.write(b"end")
    os.link(big / "random-0", root / "hard link")
    (root / "link").symlink_to("big/random-1")
    (root / "dangling").symlink_to("nowhere")
    os.mkfifo(root / "fifo")
    os.setxattr(big / "random-1", "user.colour", b"blue")
    run("setfacl", "-m", "u:1234:r", big / "random-2")
    (big / "random-3").chmod(0o4750)
    os.chown(big / "random-4", 1234, 4321)
    os.utime(big / "random-4", ns=(10**18 + 1, 10**18 + 123456789))
    return root


@pytest.fixture
def mount(mount_of, net, request):
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.removeprefix("test_"))
    bucket = net.bucket(name.strip("-")[:60].strip("-"))
    made = mount_of(bucket)
    made.mount()
    return made


@contextlib.contextmanager
def trouble(net, delay):
    """30 of 110 nodes die, and the satellite is killed and started again, while the block runs."""
    done, happened = threading.Event(), []

    def make():
        if not done.wait(delay):
            net.testnet("kill", "--count", "30")
            happened.append("nodes")
        if not done.wait(delay):
            net.testnet("kill", "--satellite")
            happened.append("satellite")
            time.sleep(2)  # noqa: TID251 -- away for a while
            net.testnet("revive", "--satellite")

    thread = threading.Thread(target=make)
    thread.start()
    try:
        yield thread.is_alive
    finally:
        done.set()
        thread.join()
    assert happened == ["nodes", "satellite"], "the program was too fast for its troubles"


def assert_same_tree(one, other):
    """Content, modes, owners, times, links, attributes: rsync finds nothing to do."""
    done = run(
        "rsync", "-naHAXS", "--checksum", "--delete", "--itemize-changes", f"{one}/", f"{other}/"
    )
    assert done.stdout == ""


def remount_cold(mount):
    mount.umount()
    mount.forget_cache()
    mount.mount()


def test_git(mount, tmp_path):
    origin = tmp_path / "origin"
    origin.mkdir()
    identity = {
        "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b",
    }  # fmt: skip
    run("git", "init", "-q", origin)
    for number in range(20):
        for item in range(20):
            path = origin / f"d{item % 7}" / f"f{item}"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{number} {item}\n" * 300)
        run("git", "add", "-A", cwd=origin)
        run("git", "commit", "-qm", f"change {number}", cwd=origin, **identity)
    clone = mount.point / "clone"
    run("git", "clone", "-q", "--no-local", origin, clone)
    (clone / "new").write_text("on the mount")
    run("git", "add", "new", cwd=clone)
    run("git", "commit", "-qm", "from the mount", cwd=clone, **identity)
    run("git", "gc", "-q", "--aggressive", "--prune=now", cwd=clone)
    remount_cold(mount)
    run("git", "fsck", "--full", "--strict", cwd=clone)
    assert run("git", "status", "--porcelain", cwd=clone).stdout == ""
    assert run("git", "rev-list", "--count", "HEAD", cwd=clone).stdout.strip() == "21"


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_sqlite(mount, journal):
    program = (
        "import sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "c.execute('PRAGMA journal_mode=' + sys.argv[2])\n"
        "c.execute('PRAGMA synchronous=FULL')\n"
        "c.execute('CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY, data BLOB)')\n"
        "n = c.execute('SELECT coalesce(max(n), 0) FROM t').fetchone()[0]\n"
        "while True:\n"
        "    n += 1\n"
        "    c.execute('BEGIN')\n"
        "    c.execute('INSERT INTO t VALUES (?, randomblob(3000))', (n,))\n"
        "    c.execute('UPDATE t SET data=randomblob(2000) WHERE n=?', (n // 2,))\n"
        "    c.execute('COMMIT')\n"
        "    print(n, flush=True)\n"
    )
    path = mount.point / "data.db"
    committed = 0
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", program, str(path), journal],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        ) as writer:  # fmt: skip
            deadline = time.monotonic() + 4
            while time.monotonic() < deadline:
                line = writer.stdout.readline()
                assert line, "the writer has stopped"
                committed = int(line)
            mount.kill()  # the daemon, under the writer's feet
            committed = max([committed, *map(int, writer.stdout.read().split())])
            assert writer.wait(30) != 0
        mount.mount()
        assert checked_rows(path) >= committed
    remount_cold(mount)
    assert checked_rows(path) >= committed


def checked_rows(path):
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return database.execute("SELECT count(*) FROM t").fetchone()[0]


def test_rsync_twice(mount, source):
    target = mount.point / "copy"
    run("rsync", "-aHAXS", f"{source}/", f"{target}/")
    remount_cold(mount)
    again = run("rsync", "-aHAXS", "--itemize-changes", "--stats", f"{source}/", f"{target}/")
    assert "Number of regular files transferred: 0" in again.stdout
    assert_same_tree(source, target)
    sparse = target / "big" / "sparse"
    assert sparse.stat().st_blocks * 512 < MIB


def test_tar_round_trip(mount, source, tmp_path):
    archive = mount.point / "all.tar"
    flags = ["--acls", "--xattrs", "--sparse"]
    run("tar", *flags, "-C", source, "-cf", archive, ".")
    unpacked = mount.point / "unpacked"
    unpacked.mkdir()
    run("tar", *flags, "--xattrs-include=*", "-C", unpacked, "-xpf", archive)
    remount_cold(mount)
    run("tar", "-C", unpacked, "-df", archive)
    assert_same_tree(source, unpacked)


def test_restic_while_nodes_die_and_the_satellite_restarts(mount, net, source, tmp_path):
    mount.umount()
    mount.mount(",cache_size=256MiB")
    repository = mount.point / "restic"
    secret = {"RESTIC_PASSWORD": "x", "RESTIC_CACHE_DIR": tmp_path / "restic-cache"}
    more = tmp_path / "more"
    more.mkdir()
    for number in range(12):  # with the copies more than the cache holds
        (more / str(number)).write_bytes(os.urandom(25 * MIB))
    run("restic", "init", "-r", repository, **secret)
    with trouble(net, 1.5):
        run("restic", "backup", "-r", repository, source, more, **secret)
    shutil.rmtree(tmp_path / "restic-cache", ignore_errors=True)
    remount_cold(mount)
    run("restic", "check", "--read-data", "-r", repository, **secret)
    restored = tmp_path / "restored"
    run("restic", "restore", "latest", "-r", repository, "--target", restored, **secret)
    assert_same_tree(source, restored / source.relative_to("/"))
    assert_same_tree(more, restored / more.relative_to("/"))


def test_borg_while_nodes_die_and_the_satellite_restarts(mount, net, source, tmp_path):
    repository = mount.point / "borg"
    secret = {
        "BORG_PASSPHRASE": "x", "BORG_BASE_DIR": tmp_path / "borg-base",
        "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
    }  # fmt: skip
    run("borg", "init", "-e", "repokey", repository, **secret)
    with trouble(net, 1.0) as goes_on:
        number = 0
        while number == 0 or goes_on():
            number += 1
            run("borg", "create", f"{repository}::{number}", source, **secret)
    remount_cold(mount)
    run("borg", "check", "--verify-data", repository, **secret)
    restored = tmp_path / "restored"
    restored.mkdir()
    run("borg", "extract", f"{repository}::{number}", cwd=restored, **secret)
    assert_same_tree(source, restored / source.relative_to("/"))


def test_duplicity(mount, source, tmp_path):
    options = ["--no-encryption", "--archive-dir", tmp_path / "archive", "--volsize", "16"]
    url = f"file://{mount.point}/duplicity"
    (mount.point / "duplicity").mkdir()
    run("duplicity", "full", *options, source, url)
    remount_cold(mount)
    shutil.rmtree(tmp_path / "archive")
    run("duplicity", "verify", "--compare-data", *options, url, source)


def test_rclone_sync(mount, source):
    target = mount.point / "rclone"
    options = ["--links", "--config", "/dev/null", "--exclude", "/fifo"]
    run("rclone", "sync", *options, source, target)
    remount_cold(mount)
    run("rclone", "check", "--download", *options, source, target)
    again = run("rclone", "sync", *options, "-v", source, target)
    assert "Copied" not in again.stderr


def test_building_a_debian_package(mount, tmp_path):
    """`hello` from its Debian source: unpacked, configured, compiled and tested on the mount."""
    lists = tmp_path / "lists"
    (lists / "partial").mkdir(parents=True)
    sources = tmp_path / "sources.list"
    sources.write_text("deb-src http://deb.debian.org/debian bookworm main\n")
    apt = [
        "apt-get", "-qq", "-o", f"Dir::Etc::sourcelist={sources}", "-o", "Dir::Etc::sourceparts=-",
        "-o", f"Dir::State::lists={lists}", "-o", "APT::Sandbox::User=root",
    ]  # fmt: skip
    run(*apt, "update")
    run(*apt, "source", "--download-only", "hello", cwd=tmp_path)
    (dsc,) = tmp_path.glob("hello_*.dsc")
    tree = mount.point / "hello"
    run("dpkg-source", "-x", dsc, tree)
    run("./configure", "--quiet", cwd=tree, FORCE_UNSAFE_CONFIGURE="1")
    run("make", "-j2", cwd=tree)
    run("make", "check", cwd=tree)
    times = {path: path.lstat().st_mtime_ns for path in tree.rglob("*")}
    remount_cold(mount)
    assert run(tree / "hello").stdout == "Hello, world!\n"
    assert {path: path.lstat().st_mtime_ns for path in tree.rglob("*")} == times

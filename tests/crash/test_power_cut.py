"""The power goes at every point of a session; what was promised is there, in one consistent state.

The log has one order for data and names, so after a crash the tree must be exactly what it was
after some operation between the last fsync that returned and the last operation begun.
"""

import os
import random
import shutil
from contextlib import asynccontextmanager

import pytest
import trio

from dcsfs.access import AccessGrant
from dcsfs.cache import log as log_module
from dcsfs.fs.building import Caller, Changes
from dcsfs.fs.mounted import VolumeOptions, close_session, open_volume
from dcsfs.uplink.buckets import create_bucket
from network.messages import Kind
from tests.crash.disk import PowerCut, RecordingDisk, contents
from tests.planet import planet

CALLER = Caller(1000, 1000, 0o022)
SLAB_BYTES = 1 << 20
CALLS_MAX = 75
"""The schedule makes a few calls fewer that change the disk."""


def grant_for(world):
    return AccessGrant(world.address, world.api_key, b"p" * 32, b"s" * 16, 65536, 3)


@asynccontextmanager
async def mounted(world, directory):
    async with open_volume(
        world.runtime, world.pool(), grant_for(world), "photos", VolumeOptions(directory)
    ) as found:
        yield found


async def tree_of(mount):
    """{path: (kind, mode, links, content or target)} of everything in the bucket."""
    fs, found = mount.filesystem, {}

    async def walk(number, prefix):
        for entry in await fs.directories.read(number):
            inode = fs.inode(entry.child)
            path = prefix + entry.name.decode()
            content = inode.symlink
            if inode.kind is Kind.DIRECTORY:
                await walk(inode.number, path + "/")
            elif inode.kind is Kind.FILE:
                handle = await fs.open(inode.number, os.O_RDONLY)
                content = bytes(await fs.read(handle, 0, inode.size)) if inode.size else b""
                fs.release(handle)
            found[path] = (inode.kind, inode.mode, inode.nlink, content)

    await walk(fs.root.number, "")
    return found


class Session:
    """A fixed schedule of operations with the tree after each, and what has been promised."""

    def __init__(self, mount, seed):
        self.mount = mount
        self.fs = mount.filesystem
        self.random = random.Random(seed)
        self.states = [{}]
        self.promised = 0
        self.handles = {}

    async def _node(self, path):
        inode = self.fs.root
        for part in path.split("/"):
            if part:
                inode = await self.fs.directories.lookup(inode.number, part.encode())
        return inode

    async def _parent(self, path):
        folder, _, name = path.rpartition("/")
        return (await self._node(folder)).number, name.encode()

    async def _did(self, expected):
        """The state is noted before the operation begins: it may be cut in the middle."""
        self.states.append(expected)

    async def mkdir(self, path):
        await self._did(self.states[-1] | {path: (Kind.DIRECTORY, 0o755, 2, b"")})
        parent, name = await self._parent(path)
        await self.fs.create_node(parent, name, Kind.DIRECTORY, 0o755, CALLER)

    async def create(self, path):
        await self._did(self.states[-1] | {path: (Kind.FILE, 0o644, 1, b"")})
        parent, name = await self._parent(path)
        handle, _ = await self.fs.create(parent, name, 0o644, os.O_WRONLY, CALLER)
        self.handles[path] = handle

    async def write(self, path, offset, size):
        data = self.random.randbytes(size)
        kind, mode, links, old = self.states[-1][path]
        new = old.ljust(offset, b"\0")[:offset] + data + old[offset + size :]
        await self._did(self.states[-1] | {path: (kind, mode, links, new)})
        await self.fs.write(self.handles[path], offset, data)

    async def truncate(self, path, size):
        kind, mode, links, old = self.states[-1][path]
        new = old[:size].ljust(size, b"\0")
        await self._did(self.states[-1] | {path: (kind, mode, links, new)})
        await self.fs.set_attributes((await self._node(path)).number, Changes(size=size))

    async def chmod(self, path, mode):
        kind, _, links, content = self.states[-1][path]
        await self._did(self.states[-1] | {path: (kind, mode, links, content)})
        await self.fs.set_attributes((await self._node(path)).number, Changes(mode=mode))

    async def rename(self, source, target):
        state = dict(self.states[-1])
        state[target] = state.pop(source)
        await self._did(state)
        self.handles[target] = self.handles.pop(source)
        await self.fs.rename(*await self._parent(source), *await self._parent(target), 0)

    async def unlink(self, path):
        await self._did({k: v for k, v in self.states[-1].items() if k != path})
        self.fs.release(self.handles.pop(path))
        await self.fs.unlink(*await self._parent(path))

    async def fsync(self, path):
        reached = len(self.states) - 1
        await self.fs.fsync((await self._node(path)).number)
        self.promised = reached

    async def flush(self):
        reached = len(self.states) - 1
        await self.mount.drain()
        self.promised = reached

    async def run(self):
        """Names and data in one order, several slabs, flushes between; every kind of record."""
        await self.mkdir("d")
        await self.create("d/a")
        await self.write("d/a", 0, 150_000)
        await self.fsync("d/a")
        await self.create("d/a.new")
        await self.write("d/a.new", 0, 70_000)
        await self.fsync("d/a.new")
        await self.rename("d/a.new", "d/a")  # the classic safe save
        await self.fsync("d")
        await self.create("big")
        for number in range(6):
            await self.write("big", number * 180_000, 180_000)
        await self.flush()
        await self.write("big", 90_000, 5_000)
        await self.truncate("big", 400_000)
        await self.fsync("big")
        await self.chmod("big", 0o600)
        await self.create("gone")
        await self.write("gone", 0, 100_000)
        await self.unlink("gone")
        await self.fsync("d")
        await self.flush()
        for number in range(5):
            await self.create(f"small{number}")
            await self.write(f"small{number}", 0, 3000 + number)
        await self.fsync("small4")
        await self.rename("small0", "d/moved")
        await self.write("d/a", 60_000, 20_000)
        await self.fsync("d/a")


async def session_until_cut(world, cache, disk, seed):
    """Run the schedule with the disk; returns the session as far as it came."""
    session = None
    try:
        async with mounted(world, cache) as mount:
            session = Session(mount, seed)
            await session.run()
    except BaseExceptionGroup as group:
        if group.split(PowerCut)[1] is not None:
            raise
    except PowerCut:
        pass
    return session


def patch_log(monkeypatch, disk):
    monkeypatch.setattr(log_module, "SLAB_BYTES", SLAB_BYTES)
    monkeypatch.setattr(log_module, "os", disk)
    monkeypatch.setattr(log_module, "write_fully", disk.write_fully)
    monkeypatch.setattr(log_module, "sync_directory", disk.sync_directory)


def after_the_cut(cache, target, disk, before, chance):
    """A copy of the cache directory whose log is what the disk may hold."""
    shutil.copytree(cache, target, ignore=shutil.ignore_patterns("log", "lock"))
    disk.rebuild(target / "log", before, chance)
    return target


def check(session, tree):
    """The tree is one of the states between what was promised and what was begun."""
    if session is None:
        assert tree == {}
        return
    allowed = session.states[session.promised :]
    assert tree in allowed, (
        f"promised {session.promised}, begun {len(session.states) - 1}: "
        f"{ {k: (v[1], v[2], len(v[3])) for k, v in tree.items()} }"
    )


async def cut_and_recover(tmp_path, monkeypatch, cut_at, chance_seed, second_cut=None):
    """One life of a cache directory: cut, maybe cut again during the recovery, then checked."""
    tmp_path.mkdir(parents=True)
    (tmp_path / "world").mkdir()
    async with planet(tmp_path / "world") as world:
        await create_bucket(world.runtime, world.pool(), grant_for(world), "photos", 1000, 1000)
        disk = RecordingDisk(cut_at)
        with monkeypatch.context() as patch, trio.fail_after(3600):
            patch_log(patch, disk)
            session = await session_until_cut(world, tmp_path / "cache", disk, 1)
        calls = disk.calls
        chance = None if chance_seed is None else random.Random(chance_seed)
        cache = after_the_cut(tmp_path / "cache", tmp_path / "cache2", disk, {}, chance)
        if second_cut is not None:
            before = contents(cache / "log")
            disk = RecordingDisk(second_cut)
            disk.events = []
            with monkeypatch.context() as patch, trio.fail_after(3600):
                patch_log(patch, disk)
                try:
                    async with mounted(world, cache) as mount:
                        await mount.drain()
                except (PowerCut, BaseExceptionGroup) as error:
                    if isinstance(error, BaseExceptionGroup) and error.split(PowerCut)[1]:
                        raise
            cache = after_the_cut(cache, tmp_path / "cache3", disk, before, chance)
        with monkeypatch.context() as patch, trio.fail_after(3600):
            patch.setattr(log_module, "SLAB_BYTES", SLAB_BYTES)
            async with mounted(world, cache) as mount:
                recovered = await tree_of(mount)
                check(session, recovered)
                await mount.drain()
                await close_session(mount)
            async with mounted(world, tmp_path / "other") as mount:
                assert await tree_of(mount) == recovered
    shutil.rmtree(tmp_path)
    return calls


async def test_the_schedule_runs_without_a_cut(tmp_path, autojump_clock, monkeypatch):
    calls = await cut_and_recover(tmp_path / "life", monkeypatch, None, None)
    assert 60 < calls <= CALLS_MAX


@pytest.mark.parametrize("cut_at", range(3, 63, 10))
async def test_a_cut_keeps_what_was_promised(tmp_path, autojump_clock, monkeypatch, cut_at):
    await cut_and_recover(tmp_path / "strict", monkeypatch, cut_at, None)
    await cut_and_recover(tmp_path / "torn", monkeypatch, cut_at, cut_at)


async def test_without_the_sync_a_cut_breaks_the_promise(tmp_path, autojump_clock, monkeypatch):
    """The guard switched off: an fsync that does not reach the disk is found out."""
    with monkeypatch.context() as patch:
        patch.setattr(log_module.WriteLog, "_sync_files", lambda self, files, entries: None)
        broken = pytest.RaisesExc(AssertionError, match="promised")
        with pytest.RaisesGroup(broken, flatten_subgroups=True):
            await cut_and_recover(tmp_path / "life", monkeypatch, 20, None)


@pytest.mark.crash
@pytest.mark.parametrize("cut_at", range(CALLS_MAX))
async def test_a_cut_anywhere(tmp_path, autojump_clock, monkeypatch, cut_at):
    """Every point, with what is not durable lost, and with a random part of it there."""
    await cut_and_recover(tmp_path / "strict", monkeypatch, cut_at, None)
    for chance in range(4):
        await cut_and_recover(tmp_path / f"torn{chance}", monkeypatch, cut_at, chance)


@pytest.mark.crash
@pytest.mark.parametrize("second_cut", range(12))
@pytest.mark.parametrize("cut_at", range(5, 100, 9))
async def test_a_cut_during_the_recovery_of_a_cut(
    tmp_path, autojump_clock, monkeypatch, cut_at, second_cut
):
    for chance in (None, 1, 2):
        await cut_and_recover(tmp_path / f"c{chance}", monkeypatch, cut_at, chance, second_cut)

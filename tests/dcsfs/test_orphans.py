"""Inodes that lose their last name while several mounts are at work."""

import os
import sqlite3
from contextlib import asynccontextmanager

import pytest
import trio

from dcsfs.fs.mounted import close_session
from dcsfs.uplink.client import open_bucket
from network import messages as m
from network.errors import NotFound
from network.limits import ORPHAN_INTERVAL_S
from satellite import orphans
from satellite.metabase import inodes
from tests.dcsfs.test_filesystem import (
    CALLER,
    bucket_world,
    grant_for,
    mounted,
    read_file,
    write_file,
)
from tests.dcsfs.test_quota import set_quota
from tests.dcsfs.test_shared import cuttable, until

DATA = bytes(range(256)) * 1000


async def is_there(mount, number):
    request = m.InodeRequest(mount.client.api_key, mount.client.bucket, number)
    try:
        await mount.client.call(m.GET_INODE, request)
    except NotFound:
        return False
    return True


async def used_bytes(world):
    client = await open_bucket(world.runtime, world.pool(), grant_for(world), "photos")
    return client.info.used_bytes


@asynccontextmanager
async def two_mounts(tmp_path):
    async with (
        bucket_world(tmp_path) as world,
        mounted(world, tmp_path) as m1,
        mounted(world, tmp_path, "other") as m2,
    ):
        await trio.sleep(2)
        yield world, m1, m2


async def test_a_file_goes_when_the_last_mount_has_closed_it(tmp_path, autojump_clock):
    async with two_mounts(tmp_path) as (world, m1, m2):
        root = m1.filesystem.root.number
        kept = await write_file(m1.filesystem, root, b"kept", DATA)
        gone = await write_file(m1.filesystem, root, b"gone", DATA)
        await m1.drain()
        assert await used_bytes(world) == 2 * len(DATA)
        await m2.filesystem.directories.lookup(root, b"kept")
        handle = await m2.filesystem.open(kept.number, os.O_RDONLY)
        for name in (b"kept", b"gone"):
            await m1.filesystem.unlink(root, name)
        await trio.sleep(3 * ORPHAN_INTERVAL_S)
        assert not await is_there(m1, gone.number)
        assert await used_bytes(world) == len(DATA)
        assert bytes(await m2.filesystem.read(handle, 1000, 500)) == DATA[1000:1500]
        m2.filesystem.release(handle)
        await trio.sleep(3 * ORPHAN_INTERVAL_S)
        assert not await is_there(m1, kept.number)
        assert await used_bytes(world) == 0
        await write_file(m2.filesystem, root, b"kept", b"another")
        assert m1.volume.is_shared
        assert m2.volume.is_shared


async def test_a_mount_that_does_not_answer_may_hold_anything(tmp_path, autojump_clock):
    async with (
        bucket_world(tmp_path) as world,
        mounted(world, tmp_path) as m1,
        cuttable(world, tmp_path, "away") as (runtime, away),
    ):
        root = m1.filesystem.root.number
        await trio.sleep(2)
        inode = await write_file(m1.filesystem, root, b"f", DATA)
        await m1.drain()
        await away.filesystem.directories.lookup(root, b"f")
        handle = await away.filesystem.open(inode.number, os.O_RDONLY)
        runtime.cut()
        await m1.filesystem.unlink(root, b"f")
        await trio.sleep(3 * ORPHAN_INTERVAL_S)
        assert await is_there(m1, inode.number)
        runtime.is_cut = False
        await until(lambda: away.volume.is_trusted)
        await trio.sleep(3 * ORPHAN_INTERVAL_S)
        assert bytes(await away.filesystem.read(handle, 0, 500)) == DATA[:500]
        away.filesystem.release(handle)
        await trio.sleep(3 * ORPHAN_INTERVAL_S)
        assert not await is_there(m1, inode.number)


async def test_more_orphans_than_one_question_holds(tmp_path, autojump_clock, monkeypatch):
    monkeypatch.setattr(orphans, "ORPHANS_ASKED_MAX", 5)
    async with two_mounts(tmp_path) as (_, m1, m2):
        root = m1.filesystem.root.number
        names = [b"%d" % number for number in range(23)]
        made = [await write_file(m1.filesystem, root, name, b"content") for name in names]
        await m1.drain()
        handles = [await m1.filesystem.open(inode.number, os.O_RDONLY) for inode in made[:7]]
        for name in names:
            await m2.filesystem.unlink(root, name)
        await trio.sleep(3 * ORPHAN_INTERVAL_S)
        there = [inode for inode in made if await is_there(m1, inode.number)]
        assert there == made[:7]
        for handle in handles:
            assert bytes(await m1.filesystem.read(handle, 0, 100)) == b"content"


@pytest.mark.parametrize("step", ["buckets_with_orphans", "page", "drop"])
async def test_a_database_that_fails_once_ends_nothing(tmp_path, autojump_clock, monkeypatch, step):
    failures = []
    works = getattr(orphans, step)

    def fails_once(*arguments, **named):
        if not failures:
            failures.append(step)
            raise sqlite3.OperationalError("database or disk is full")
        return works(*arguments, **named)

    async with two_mounts(tmp_path) as (_, m1, m2):
        monkeypatch.setattr(orphans, step, fails_once)
        root = m1.filesystem.root.number
        inode = await write_file(m1.filesystem, root, b"f", DATA)
        await m1.drain()
        await m2.filesystem.unlink(root, b"f")
        await trio.sleep(4 * ORPHAN_INTERVAL_S)
        assert failures
        assert not await is_there(m1, inode.number)


async def test_staged_content_of_a_file_that_others_removed_outlives_the_return_of_the_lease(
    tmp_path, autojump_clock
):
    async with bucket_world(tmp_path) as world:
        async with mounted(world, tmp_path) as m1:
            root = m1.filesystem.root.number
            async with mounted(world, tmp_path, "other") as m2:
                await trio.sleep(2)
                await set_quota(world, 100_000)
                inode = await write_file(m1.filesystem, root, b"f", DATA)
                handle, _ = await m1.filesystem.create(root, b"open", 0o644, os.O_RDWR, CALLER)
                await m1.filesystem.write(handle, 0, DATA)
                m1.writeback.demand()
                await until(lambda: m1.writeback.refusal is not None)
                for name in (b"f", b"open"):
                    await m2.filesystem.unlink(root, name)
                await close_session(m2)
            await until(lambda: not m1.volume.is_shared)
            sent = m1.client.counters.sent_bytes
            await trio.sleep(120)
            assert m1.client.counters.sent_bytes == sent
            await set_quota(world, 0)
            with trio.fail_after(60):
                await m1.drain()
            assert not m1.writeback.conflicts.notes
            assert bytes(await m1.filesystem.read(handle, 0, len(DATA))) == DATA
            assert await is_there(m1, inode.number)
            await close_session(m1)
        assert await used_bytes(world) == 0


async def test_staged_content_of_a_file_that_is_gone_is_kept_beside(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world, mounted(world, tmp_path) as mount:
        fs, root = mount.filesystem, mount.filesystem.root.number
        inode = await write_file(fs, root, b"f", b"old")
        await mount.drain()
        await write_file(fs, root, b"other", DATA)
        handle = await fs.open(inode.number, os.O_WRONLY)
        await fs.write(handle, 0, DATA)
        fs.release(handle)

        def remove(tx):
            tx.execute("DELETE FROM dentry WHERE child=?", (inode.number,))
            tx.execute("UPDATE inode SET nlink=0 WHERE inode=?", (inode.number,))
            [(bucket_id,)] = tx.all("SELECT bucket_id FROM bucket", ())
            inodes.reap(tx, bucket_id, inode.number)

        await world.database.write(remove)  # no mount can: by hand, or an old backup of it
        with trio.fail_after(60):
            await mount.drain()
        names = [entry.name for entry in await fs.directories.read(root)]
        copy = next(name for name in names if name.startswith(b"f (conflict"))
        assert await read_file(fs, await fs.directories.lookup(root, copy)) == DATA
        await close_session(mount)
        async with mounted(world, tmp_path, "fresh") as fresh:
            found = [entry.name for entry in await fresh.filesystem.directories.read(root)]
            assert sorted(found) == [copy, b"other"]
            again = await fresh.filesystem.directories.lookup(root, copy)
            assert await read_file(fresh.filesystem, again) == DATA

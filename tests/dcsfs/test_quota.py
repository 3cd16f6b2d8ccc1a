"""A bucket's quota: counted and decided by the satellite, told to writers in time, shown by df."""

import errno
import os

import pyfuse3
import pytest
import trio

from dcsfs.fs.building import Changes
from dcsfs.fs.errors import FsError
from dcsfs.fuse.operations import STATFS_FREE_BYTES, DcsOperations
from dcsfs.library import Project
from network.errors import InvalidArgument, NotFound, QuotaExceeded
from satellite.metabase import buckets
from tests.dcsfs.test_filesystem import (
    CALLER,
    bucket_world,
    grant_for,
    mounted,
    read_file,
    write_file,
)

KB = 1000
CTX = pyfuse3.RequestContext()


async def set_quota(world, quota_bytes):
    return await world.database.write(
        lambda tx: buckets.set_quota(tx, "test", "photos", quota_bytes)
    )


async def refused(operation, *arguments):
    with pytest.raises(FsError) as caught:
        await operation(*arguments)
    return errno.errorcode[caught.value.errno]


async def test_a_full_bucket_refuses_what_is_more_and_takes_what_overwrites(
    tmp_path, autojump_clock
):
    async with bucket_world(tmp_path) as world:
        await set_quota(world, 1000 * KB)
        async with mounted(world, tmp_path) as mount:
            fs, root = mount.filesystem, mount.filesystem.root.number
            data = os.urandom(900 * KB)
            inode = await write_file(fs, root, b"f", data)
            handle = await fs.open(inode.number, os.O_RDWR)
            other, _ = await fs.create(root, b"g", 0o644, os.O_RDWR, CALLER)
            assert await refused(fs.write, other, 0, bytes(101 * KB)) == "EDQUOT"
            assert await fs.write(other, 0, b"x" * 100 * KB) == 100 * KB
            assert await refused(fs.write, other, 100 * KB, b"!") == "EDQUOT"
            assert await refused(fs.write, handle, 900 * KB - 1, b"ab") == "EDQUOT"
            for _ in range(3):  # more than the quota in all, and not a byte more in the bucket
                data = os.urandom(900 * KB)
                await fs.write(handle, 0, data)
                await mount.drain()
            assert await fs.write(handle, 2**40, b"") == 0
            await fs.set_attributes(inode.number, Changes(size=2**40))  # holes are free
            await fs.set_attributes(inode.number, Changes(size=900 * KB))
            await fs.unlink(root, b"g")
            fs.release(other)
            await mount.drain()
            await fs.write(handle, 900 * KB, b"y" * 50 * KB)
            assert await read_file(fs, inode) == data + b"y" * 50 * KB
            await mount.drain()
            assert await set_quota(world, 1000 * KB) == 950 * KB


async def test_what_this_mount_has_committed_counts_at_once(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world:
        await set_quota(world, 1000 * KB)
        async with mounted(world, tmp_path) as mount:
            fs, root = mount.filesystem, mount.filesystem.root.number
            await write_file(fs, root, b"first", os.urandom(600 * KB))
            await mount.drain()
            second, _ = await fs.create(root, b"second", 0o644, os.O_RDWR, CALLER)
            assert await refused(fs.write, second, 0, bytes(401 * KB)) == "EDQUOT"
            await fs.unlink(root, b"first")
            await fs.write(second, 0, bytes(900 * KB))
            await fs.fsync(fs.handle_inode(second).number)
            await mount.drain()
            assert await set_quota(world, 1000 * KB) == 900 * KB


async def test_writers_at_the_same_time_do_not_overdraw_together(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world:
        await set_quota(world, 1000 * KB)
        async with mounted(world, tmp_path) as mount:
            fs, root = mount.filesystem, mount.filesystem.root.number
            refusals = []

            async def write(name):
                handle, _ = await fs.create(root, name, 0o644, os.O_RDWR, CALLER)
                try:
                    await fs.write(handle, 0, os.urandom(300 * KB))
                except FsError as error:
                    refusals.append(errno.errorcode[error.errno])
                fs.release(handle)

            async with trio.open_nursery() as nursery:
                for number in range(8):
                    nursery.start_soon(write, b"%d" % number)
            assert refusals == 5 * ["EDQUOT"]
            await mount.drain()
            assert mount.writeback.refusal is None
            assert await set_quota(world, 1000 * KB) == 900 * KB


async def test_a_quota_lowered_while_content_is_staged_is_reported_and_loses_nothing(
    tmp_path, autojump_clock
):
    async with bucket_world(tmp_path) as world, mounted(world, tmp_path) as mount:
        fs, root = mount.filesystem, mount.filesystem.root.number
        data = os.urandom(300 * KB)
        inode = await write_file(fs, root, b"f", data)
        await set_quota(world, 100 * KB)
        with trio.move_on_after(40):
            await mount.drain()
        assert await refused(fs.fsync, inode.number) == "EDQUOT"
        assert "the bucket holds 0 B of 97.7 KiB" in mount.writeback.last_error
        sent = mount.client.counters.sent_bytes
        await trio.sleep(120)
        assert mount.client.counters.sent_bytes == sent  # tried again without sending it again
        assert await read_file(fs, inode) == data
        await set_quota(world, 0)
        await mount.drain()
        await fs.fsync(inode.number)
        assert await set_quota(world, 0) == len(data)


async def test_removing_the_staged_file_makes_room_for_the_others(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world, mounted(world, tmp_path) as mount:
        fs, root = mount.filesystem, mount.filesystem.root.number
        await write_file(fs, root, b"large", os.urandom(300 * KB))
        emptied = await write_file(fs, root, b"emptied", os.urandom(300 * KB))
        small = await write_file(fs, root, b"small", b"small")
        await set_quota(world, 100 * KB)
        with trio.move_on_after(40):
            await mount.drain()
        assert mount.writeback.refusal is not None
        await fs.unlink(root, b"large")
        await fs.set_attributes(emptied.number, Changes(size=0))
        with trio.fail_after(60):
            await mount.drain()
        assert await read_file(fs, small) == b"small"
        assert await read_file(fs, emptied) == b""
        assert await set_quota(world, 0) == 5


async def test_df_shows_the_quota_and_what_is_left(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world, mounted(world, tmp_path) as mount:
        fs = mount.filesystem
        operations = DcsOperations(fs, writeback_cache=False)
        shown = await operations.statfs(CTX)
        assert shown.f_bavail * shown.f_frsize == STATFS_FREE_BYTES
        await set_quota(world, 4096 * 1000)
        await write_file(fs, fs.root.number, b"f", bytes(4096 * 300))
        await trio.sleep(6)
        shown = await operations.statfs(CTX)
        assert (shown.f_blocks, shown.f_bfree, shown.f_bavail) == (1000, 700, 700)
        await mount.drain()
        await trio.sleep(6)
        shown = await operations.statfs(CTX)
        assert (shown.f_blocks, shown.f_bavail) == (1000, 700)
        async with mounted(world, tmp_path, "reader", read_only=True) as reader:
            shown = await DcsOperations(reader.filesystem, writeback_cache=False).statfs(CTX)
            assert (shown.f_blocks, shown.f_bavail) == (1000, 700)
        await world.stop_satellite()
        await trio.sleep(6)
        began = trio.current_time()
        shown = await operations.statfs(CTX)
        assert (shown.f_blocks, shown.f_bavail) == (1000, 700)
        assert trio.current_time() - began <= 3.1
        await world.start_satellite()


async def test_what_others_write_counts(tmp_path, autojump_clock):
    async with (
        bucket_world(tmp_path) as world,
        mounted(world, tmp_path) as first,
        mounted(world, tmp_path, "other") as second,
    ):
        await set_quota(world, 100 * KB)
        await first.filesystem.space.refresh(0.0)
        await second.filesystem.space.refresh(0.0)
        root = first.filesystem.root.number
        await write_file(first.filesystem, root, b"a", bytes(80 * KB))
        await first.drain()
        handle, _ = await second.filesystem.create(root, b"b", 0o644, os.O_WRONLY, CALLER)
        await second.filesystem.write(handle, 0, bytes(30 * KB))  # it does not know yet
        assert await refused(second.filesystem.flush, handle) == "EDQUOT"
        await set_quota(world, 0)
        await second.drain()
        await second.filesystem.flush(handle)


async def test_bad_quotas_are_refused(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world:
        for wrong in (-1, 2**63):
            with pytest.raises(InvalidArgument):
                await set_quota(world, wrong)
        with pytest.raises(NotFound, match="has no bucket 'nobody'"):
            await world.database.write(lambda tx: buckets.set_quota(tx, "test", "nobody", 1))


async def test_the_library_says_that_the_quota_is_full(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world:
        await set_quota(world, 100 * KB)
        project = Project(world.runtime, world.pool(), grant_for(world))
        for data in (bytes(200 * KB), bytes(60 * KB)):
            async with project.open_bucket("photos", cache_dir=tmp_path / "cache") as bucket:
                if len(data) > 100 * KB:
                    with pytest.raises(QuotaExceeded, match=r"'a' was not written.*bucket holds"):
                        await bucket.write_file("a", data)
                else:
                    await bucket.write_file("a", data)
                names = [info.path for info in await bucket.list_directory("")]
                assert names == (["a"] if len(data) < 100 * KB else [])
        async with project.open_bucket("photos", cache_dir=tmp_path / "cache") as bucket:
            await bucket.write_file("b", bytes(30 * KB))
            await set_quota(world, 10 * KB)
            with trio.fail_after(60), pytest.raises(QuotaExceeded):
                await bucket.sync()
            await set_quota(world, 0)


async def test_fsync_to_the_network_says_so_at_once(tmp_path, autojump_clock):
    async with (
        bucket_world(tmp_path) as world,
        mounted(world, tmp_path, sync_to_network=True) as mount,
    ):
        fs = mount.filesystem
        inode = await write_file(fs, fs.root.number, b"f", bytes(300 * KB))
        await set_quota(world, 100 * KB)
        began = trio.current_time()
        with pytest.raises(QuotaExceeded):
            await fs.fsync(inode.number)
        assert trio.current_time() - began < 10
        await set_quota(world, 0)
        await mount.drain()
        await fs.fsync(inode.number)

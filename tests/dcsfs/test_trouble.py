"""A cache disk that fails or fills up, data that cannot be uploaded: slower, refused, exported."""

import errno
import os
from contextlib import AsyncExitStack

import pytest
import trio

from dcsfs.fs import throttle
from dcsfs.fs.building import Changes
from dcsfs.fs.errors import FsError
from dcsfs.fs.export import LIST_NAME, export_cache
from dcsfs.fs.filesystem import FileSystem
from dcsfs.fs.mounted import close_session
from network.errors import InvalidArgument, WrongPassphrase
from network.messages import Kind
from network.units import MiB
from tests.dcsfs.test_filesystem import (
    CALLER,
    bucket_world,
    grant_for,
    mounted,
    read_file,
    write_file,
)


async def test_failed_cache_disk_makes_the_mount_read_only_and_sends_what_it_has(
    tmp_path, autojump_clock, monkeypatch
):
    async with bucket_world(tmp_path) as world:
        data = os.urandom(400_000)
        async with mounted(world, tmp_path) as mount:
            fs, root = mount.filesystem, mount.filesystem.root.number
            inode = await write_file(fs, root, b"f", data)

            def fails(*_):
                raise OSError(errno.EIO, "the disk is broken")

            monkeypatch.setattr(mount.volume.log, "_sync_files", fails)
            with pytest.raises(FsError, match="cache disk failed") as caught:
                await fs.fsync(inode.number)
            assert caught.value.errno == errno.EIO
            changes = [
                lambda: fs.create_node(root, b"g", Kind.FILE, 0o644, CALLER),
                lambda: fs.unlink(root, b"f"),
                lambda: fs.set_attributes(inode.number, Changes(mode=0o600)),
                lambda: fs.xattrs.set(inode.number, b"user.a", b"1"),
                lambda: fs.open(inode.number, os.O_WRONLY),
            ]
            for change in changes:
                with pytest.raises(FsError) as caught:
                    await change()
                assert caught.value.errno == errno.EROFS
            assert await read_file(fs, inode) == data
            await mount.writeback.drain()  # to the network with it
            assert await read_file(fs, inode) == data
        await trio.sleep(70)
        async with mounted(world, tmp_path, "other") as mount:
            inode = await mount.filesystem.directories.lookup(root, b"f")
            assert await read_file(mount.filesystem, inode) == data


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
async def test_a_write_the_disk_refuses_is_reported_and_not_there(
    tmp_path, autojump_clock, monkeypatch, code
):
    async with bucket_world(tmp_path) as world, mounted(world, tmp_path) as mount:
        fs = mount.filesystem
        handle, _ = await fs.create(fs.root.number, b"f", 0o644, os.O_RDWR, CALLER)
        await fs.write(handle, 0, b"before")

        def fails(*_):
            raise OSError(code, "no")

        with monkeypatch.context() as patch:
            patch.setattr("dcsfs.cache.log.write_fully", fails)
            with pytest.raises(FsError) as caught:
                await fs.write(handle, 3, b"refused")
            assert caught.value.errno == code
        assert bytes(await fs.read(handle, 0, 100)) == b"before"
        if code == errno.ENOSPC:
            await fs.write(handle, 3, b"later")  # there is space again
        else:
            with pytest.raises(FsError) as caught:
                await fs.write(handle, 3, b"later")
            assert caught.value.errno == errno.EROFS


def test_writers_are_slowed_more_and_more():
    budget = 1000 * MiB
    waits = [throttle.wait_s(MiB, used * MiB, budget, 100 * MiB) for used in range(0, 1001, 50)]
    assert waits[:16] == [0.0] * 16
    assert waits[16:] == sorted(waits[16:])
    assert waits[-1] == pytest.approx(0.01)  # at the end as fast as the network
    assert throttle.wait_s(MiB, budget, budget, 0.0) == throttle.WAIT_S_MAX


def test_drain_rate_forgets():
    rate = throttle.DrainRate()
    for second in range(60):
        rate.note(50 * MiB, float(second))
    assert rate.at(60.0) == pytest.approx(50 * MiB, rel=0.2)
    assert rate.at(75.0) == 0.0


async def test_writer_is_slowed_before_the_cache_is_full_and_then_refused(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world:
        size = 256 * MiB
        async with mounted(world, tmp_path, cache_bytes=size) as mount:
            fs: FileSystem = mount.filesystem
            for running in world.nodes:
                world.runtime.fault(running.host, running.port).stall = True
            handle, inode = await fs.create(fs.root.number, b"f", 0o644, os.O_WRONLY, CALLER)
            block, written, waited = bytes(MiB), 0, []
            with pytest.raises(FsError) as caught:
                while True:
                    started = trio.current_time()
                    await fs.write(handle, written, block)
                    waited.append(trio.current_time() - started)
                    written += MiB
            assert caught.value.errno == errno.ENOSPC
            budget = size * 3 // 4 // MiB
            assert written > 0.9 * budget * MiB
            assert max(waited[: int(0.7 * budget)]) == 0.0
            slowed = waited[int(0.8 * budget) : -1]
            assert min(slowed) > 0.0
            assert max(slowed) <= 2 * throttle.WAIT_S_MAX
            for running in world.nodes:
                world.runtime.fault(running.host, running.port).stall = False
            await mount.drain()
            await fs.write(handle, written, block)  # there is room again
            assert inode.size == written + MiB
            await mount.drain()
            await close_session(mount)


async def test_export_of_what_cannot_be_uploaded(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world:
        whole, old = os.urandom(300_000), os.urandom(100_000)
        async with mounted(world, tmp_path) as mount:
            fs, root = mount.filesystem, mount.filesystem.root.number
            await write_file(fs, root, b"committed", old)
            await write_file(fs, root, b"patched", old)
            await mount.drain()
            sub = await fs.create_node(root, b"sub", Kind.DIRECTORY, 0o755, CALLER)
            await write_file(fs, sub.number, b"first name", whole)
            await fs.rename(sub.number, b"first name", sub.number, b"new", 0)
            await fs.create_node(sub.number, b"link", Kind.SYMLINK, 0o777, CALLER, target=b"new")
            await write_file(fs, root, b"removed", b"x")
            await fs.unlink(root, b"removed")
            patched = await fs.directories.lookup(root, b"patched")
            handle = await fs.open(patched.number, os.O_WRONLY)
            await fs.write(handle, 5000, b"middle")
            fs.release(handle)
            await fs.fsync(root)
        target = tmp_path / "exported"
        await world.stop_satellite()
        with pytest.raises(WrongPassphrase):
            export_cache(world.runtime, grant_for(world, b"q" * 32), tmp_path / "cache", target)
        with pytest.raises(InvalidArgument, match="not a cache directory"):
            export_cache(world.runtime, grant_for(world), tmp_path, target)
        before = sorted((p.name, p.stat().st_size) for p in (tmp_path / "cache/log").iterdir())
        found = export_cache(world.runtime, grant_for(world), tmp_path / "cache", target)
        assert {item.path: item.is_whole for item in found} == {
            "sub/new": True,
            "sub/link": True,
            "inode 4": False,  # its name is on the network only
        } or {item.path for item in found} == {"sub/new", "sub/link", "patched"}
        assert (target / "sub" / "new").read_bytes() == whole
        assert os.readlink(target / "sub" / "link") == "new"
        part = next(item for item in found if not item.is_whole)
        assert part.ranges == ((5000, 5006),)
        assert (target / part.path).read_bytes()[5000:5006] == b"middle"
        assert (target / part.path).stat().st_size == len(old)
        assert f"parts\t{len(old)}\t5000-5006" in (target / LIST_NAME).read_text()
        assert before == sorted(
            (p.name, p.stat().st_size) for p in (tmp_path / "cache/log").iterdir()
        )
        await world.start_satellite()
        async with mounted(world, tmp_path) as mount:  # nothing was taken from the cache
            await mount.drain()
            inode = await mount.filesystem.directories.lookup(root, b"patched")
            content = await read_file(mount.filesystem, inode)
            assert content == old[:5000] + b"middle" + old[5006:]


@pytest.mark.parametrize("is_shared", [False, True])
async def test_revoked_grant_is_reported_at_fsync_and_close_and_nothing_is_lost(
    tmp_path, autojump_clock, is_shared
):
    def revoke(flag):
        return lambda tx: tx.execute("UPDATE api_key SET revoked=?", (flag,))

    async with bucket_world(tmp_path) as world, AsyncExitStack() as stack:
        mount = await stack.enter_async_context(mounted(world, tmp_path))
        if is_shared:
            await stack.enter_async_context(mounted(world, tmp_path, "other"))
        fs = mount.filesystem
        handle, inode = await fs.create(fs.root.number, b"f", 0o644, os.O_WRONLY, CALLER)
        await fs.write(handle, 0, b"kept")
        await world.database.write(revoke(1))
        mount.writeback.demand()
        with trio.fail_after(60):
            while mount.writeback.refusal is None:
                await mount.writeback.next_progress()
        for operation in (lambda: fs.fsync(inode.number), lambda: fs.flush(handle)):
            with pytest.raises(FsError, match="revoked") as caught:
                await operation()
            assert caught.value.errno == errno.EACCES
        assert inode.layers  # it is staged as before
        await world.database.write(revoke(0))
        await mount.writeback.drain()
        await fs.fsync(inode.number)
        await fs.flush(handle)
        fs.release(handle)
        assert await read_file(fs, inode) == b"kept"


async def test_shared_mount_is_read_only_too_when_its_disk_has_failed(tmp_path, autojump_clock):
    async with (
        bucket_world(tmp_path) as world,
        mounted(world, tmp_path) as mount,
        mounted(world, tmp_path, "other"),
    ):
        fs, root = mount.filesystem, mount.filesystem.root.number
        for target, code in ((b"", errno.ENOENT), (b"x" * 4096, errno.ENAMETOOLONG)):
            with pytest.raises(FsError) as caught:
                await fs.create_node(root, b"s", Kind.SYMLINK, 0o777, CALLER, target=target)
            assert caught.value.errno == code
        inode = await write_file(fs, root, b"f", b"x")
        mount.volume.log.failure = OSError(errno.EIO, "broken")
        for change in (
            lambda: fs.create_node(root, b"g", Kind.FILE, 0o644, CALLER),
            lambda: fs.unlink(root, b"f"),
            lambda: fs.xattrs.set(inode.number, b"user.a", b"1"),
        ):
            with pytest.raises(FsError) as caught:
                await change()
            assert caught.value.errno == errno.EROFS

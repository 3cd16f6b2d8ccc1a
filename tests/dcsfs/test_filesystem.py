"""The file system on a whole network in one process: round trips, recovery, tampering."""

import errno
import os
from contextlib import asynccontextmanager

import pytest
import trio

from dcsfs import keys
from dcsfs.access import AccessGrant
from dcsfs.fs import reader as reader_module
from dcsfs.fs.building import RENAME_EXCHANGE, RENAME_NOREPLACE, Caller, Changes
from dcsfs.fs.errors import FsError
from dcsfs.fs.mounted import VolumeOptions, close_session, open_volume
from dcsfs.uplink.buckets import create_bucket
from network import messages as m
from network.errors import InvalidArgument, NotFound, WrongPassphrase
from network.messages import Kind
from tests.planet import planet

CALLER = Caller(1000, 1000, 0o022)


def grant_for(world, passphrase_key=b"p" * 32):
    return AccessGrant(world.address, world.api_key, passphrase_key, b"s" * 16, 65536, 3)


@asynccontextmanager
async def mounted(world, tmp_path, name="cache", **options):
    async with open_volume(
        world.runtime,
        world.pool(),
        grant_for(world),
        "photos",
        VolumeOptions(tmp_path / name, **options),
    ) as found:
        with trio.fail_after(3600):  # virtual seconds
            yield found


@asynccontextmanager
async def bucket_world(tmp_path, **settings):
    directory = tmp_path / "world"
    directory.mkdir()
    async with planet(directory, **settings) as world:
        await create_bucket(world.runtime, world.pool(), grant_for(world), "photos", 1000, 1000)
        yield world


async def write_file(fs, parent, name, data, chunk=100_000):
    handle, inode = await fs.create(parent, name, 0o644, os.O_WRONLY, CALLER)
    for offset in range(0, len(data), chunk):
        await fs.write(handle, offset, data[offset : offset + chunk])
    fs.release(handle)
    return inode


async def read_file(fs, inode, chunk=131072):
    handle = await fs.open(inode.number, os.O_RDONLY)
    parts = []
    while True:
        part = await fs.read(handle, sum(map(len, parts)), chunk)
        if not part:
            break
        parts.append(bytes(part))
    fs.release(handle)
    return b"".join(parts)


async def test_round_trip_through_the_network(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world:
        sizes = [0, 1, 4095, 4096, 4097, 65535, 65536, 65537, 3_000_000, 9_000_000]
        contents = {f"file {size}".encode(): os.urandom(size) for size in sizes}
        async with mounted(world, tmp_path) as m1:
            fs = m1.filesystem
            sub = await fs.create_node(fs.root.number, b"sub", Kind.DIRECTORY, 0o750, CALLER)
            for name, data in contents.items():
                await write_file(fs, sub.number, name, data)
            await fs.create_node(sub.number, b"link", Kind.SYMLINK, 0o777, CALLER, target=b"file 1")
            one = await fs.directories.lookup(sub.number, b"file 1")
            await fs.link(one.number, fs.root.number, b"hard")
            await fs.xattrs.set(one.number, b"user.colour", b"blue")
            await fs.set_attributes(one.number, Changes(mode=0o600, mtime_ns=123456789))
            await m1.drain()
            await close_session(m1)
        async with mounted(world, tmp_path, "other") as m2:
            fs = m2.filesystem
            sub = await fs.directories.lookup(fs.root.number, b"sub")
            assert sub.mode == 0o750
            names = [entry.name for entry in await fs.directories.read(sub.number)]
            assert names == [*contents, b"link"]
            for name, data in contents.items():
                inode = await fs.directories.lookup(sub.number, name)
                assert inode.size == len(data)
                assert await read_file(fs, inode) == data
            assert (await fs.directories.lookup(sub.number, b"link")).symlink == b"file 1"
            hard = await fs.directories.lookup(fs.root.number, b"hard")
            assert (hard.nlink, hard.mode, hard.mtime_ns) == (2, 0o600, 123456789)
            assert hard is await fs.directories.lookup(sub.number, b"file 1")
            assert await fs.xattrs.get(hard.number, b"user.colour") == b"blue"


async def test_overwrite_truncate_and_holes_match_a_byte_array(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world:
        reference = bytearray()
        async with mounted(world, tmp_path) as m1:
            fs = m1.filesystem
            handle, inode = await fs.create(fs.root.number, b"f", 0o644, os.O_RDWR, CALLER)
            seed = 1
            for step in range(60):
                seed = (seed * 1103515245 + 12345) % 2**31
                offset, length = seed % 300_000, (seed >> 7) % 90_000 + 1
                if step % 7 == 3:
                    size = seed % 250_000
                    await fs.set_attributes(inode.number, Changes(size=size))
                    del reference[size:]
                    reference.extend(bytes(size - len(reference)))
                else:
                    data = bytes([step]) * length
                    await fs.write(handle, offset, data)
                    reference.extend(bytes(max(0, offset + length - len(reference))))
                    reference[offset : offset + length] = data
                if step % 9 == 5:
                    await m1.drain()
                assert inode.size == len(reference)
                got = bytes(await fs.read(handle, 0, 400_000))
                assert got == bytes(reference), step
            await m1.drain()
            await close_session(m1)
        async with mounted(world, tmp_path, "other") as m2:
            inode = await m2.filesystem.directories.lookup(m2.filesystem.root.number, b"f")
            assert await read_file(m2.filesystem, inode) == bytes(reference)


async def test_crash_after_fsync_replays_everything(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world:
        data = os.urandom(2_500_000)
        async with mounted(world, tmp_path) as m1:
            fs = m1.filesystem
            await write_file(fs, fs.root.number, b"old", b"first")
            await m1.drain()
            await world.stop_satellite()
            sub = await fs.create_node(fs.root.number, b"d", Kind.DIRECTORY, 0o755, CALLER)
            new = await write_file(fs, sub.number, b"new", data)
            await fs.rename(sub.number, b"new", fs.root.number, b"newer", 0)
            old = await fs.directories.lookup(fs.root.number, b"old")
            handle = await fs.open(old.number, os.O_WRONLY)
            await fs.write(handle, 2, b"XX")
            await fs.xattrs.set(old.number, b"user.a", b"1")
            await fs.fsync(new.number)
        await world.start_satellite()
        await trio.sleep(30)
        async with mounted(world, tmp_path) as m2:
            fs = m2.filesystem
            assert m2.replayed > 0
            assert (
                await read_file(fs, await fs.directories.lookup(fs.root.number, b"newer")) == data
            )
            assert (
                await read_file(fs, await fs.directories.lookup(fs.root.number, b"old")) == b"fiXXt"
            )
            await m2.drain()
            await close_session(m2)
        async with mounted(world, tmp_path, "third") as m3:
            fs = m3.filesystem
            assert (
                await read_file(fs, await fs.directories.lookup(fs.root.number, b"newer")) == data
            )
            old = await fs.directories.lookup(fs.root.number, b"old")
            assert await read_file(fs, old) == b"fiXXt"
            assert await fs.xattrs.get(old.number, b"user.a") == b"1"
            names = {entry.name for entry in await fs.directories.read(fs.root.number)}
            assert names == {b"old", b"newer", b"d"}


async def test_namespace_errors_are_posix(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world, mounted(world, tmp_path) as m1:
        fs, root = m1.filesystem, m1.filesystem.root.number
        a = await fs.create_node(root, b"a", Kind.DIRECTORY, 0o755, CALLER)
        b = await fs.create_node(a.number, b"b", Kind.DIRECTORY, 0o755, CALLER)
        await write_file(fs, root, b"f", b"x")
        await write_file(fs, root, b"g", b"y")

        async def code(operation, *arguments):
            with pytest.raises(FsError) as caught:
                await operation(*arguments)
            return errno_name(caught.value.errno)

        assert await code(fs.directories.lookup, root, b"nothing") == "ENOENT"
        assert await code(fs.create_node, root, b"f", Kind.FILE, 0o644, CALLER) == "EEXIST"
        assert await code(fs.rmdir, root, b"a") == "ENOTEMPTY"
        assert await code(fs.rmdir, root, b"f") == "ENOTDIR"
        assert await code(fs.unlink, root, b"a") == "EISDIR"
        assert await code(fs.rename, root, b"a", b.number, b"x", 0) == "EINVAL"
        assert await code(fs.rename, root, b"f", root, b"g", RENAME_NOREPLACE) == "EEXIST"
        assert await code(fs.rename, root, b"f", root, b"a", 0) == "EISDIR"
        assert await code(fs.rename, root, b"a", root, b"f", 0) == "ENOTDIR"
        assert await code(fs.rename, root, b"f", root, b"g", 8) == "EINVAL"
        assert await code(fs.link, a.number, root, b"l") == "EPERM"
        await fs.rename(root, b"f", root, b"g", RENAME_EXCHANGE)
        assert await read_file(fs, await fs.directories.lookup(root, b"f")) == b"y"
        await fs.rename(root, b"f", root, b"g", 0)
        assert await read_file(fs, await fs.directories.lookup(root, b"g")) == b"y"
        with pytest.raises(InvalidArgument):
            await fs.directories.lookup(root, b"a\0b")
        await m1.drain()
        assert m1.volume.root.nlink == 3


def errno_name(number):
    return errno.errorcode[number]


async def test_unlinked_open_file_lives_until_closed(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world, mounted(world, tmp_path) as m1:
        fs, root = m1.filesystem, m1.filesystem.root.number
        data = os.urandom(200_000)
        inode = await write_file(fs, root, b"f", data)
        await m1.drain()
        handle = await fs.open(inode.number, os.O_RDWR)
        await fs.unlink(root, b"f")
        await m1.drain()
        assert bytes(await fs.read(handle, 0, 300_000)) == data
        await fs.write(handle, 5, b"still here")
        assert bytes(await fs.read(handle, 5, 10)) == b"still here"
        fs.release(handle)
        await m1.drain()
        assert world.database.read(lambda tx: tx.number("SELECT count(*) FROM inode")) == 1
        assert world.database.read(lambda tx: tx.number("SELECT sum(live_bytes) FROM segment")) == 0


async def test_wrong_passphrase_is_named(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world:
        wrong = grant_for(world, b"q" * 32)
        with pytest.raises(WrongPassphrase):
            async with open_volume(
                world.runtime, world.pool(), wrong, "photos", VolumeOptions(tmp_path / "c")
            ):
                pass
        with pytest.raises(WrongPassphrase):
            await create_bucket(world.runtime, world.pool(), wrong, "second", 0, 0)


async def test_small_write_into_large_file_sends_little(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world, mounted(world, tmp_path) as m1:
        fs, root = m1.filesystem, m1.filesystem.root.number
        inode = await write_file(fs, root, b"big", os.urandom(20_000_000), 1 << 20)
        await m1.drain()
        before = m1.client.counters.sent_bytes
        handle = await fs.open(inode.number, os.O_WRONLY)
        await fs.write(handle, 7_777_777, b"!")
        fs.release(handle)
        await m1.drain()
        assert m1.client.counters.sent_bytes - before < 1 << 20


async def test_scattered_writes_are_merged_before_the_map_grows(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world, mounted(world, tmp_path) as m1:
        fs, root = m1.filesystem, m1.filesystem.root.number
        reference = bytearray(os.urandom(2 << 20))
        inode = await write_file(fs, root, b"f", bytes(reference), 1 << 20)
        await m1.drain()
        handle = await fs.open(inode.number, os.O_RDWR)
        for number in range(40):
            offset = number * 20_000 + 7
            await fs.write(handle, offset, b"z" * 5)
            reference[offset : offset + 5] = b"z" * 5
        await m1.drain()
        per_mib = [sum(r.file_offset >> 20 == n for r in inode.rows) for n in range(2)]
        assert max(per_mib) <= 16
        assert bytes(await fs.read(handle, 0, 3 << 20)) == bytes(reference)


TAMPERINGS = {
    "swap two files' maps": "UPDATE extent_row SET inode = -inode; "
    "UPDATE extent_row SET inode = {a} + {b} + inode",
    "drop extents": "DELETE FROM extent_row WHERE inode={a}",
    "truncate": "UPDATE inode SET size=5 WHERE inode={a}",
    "change the mode": "UPDATE inode SET mode=511 WHERE inode={a}",
    "shift a row": "UPDATE extent_row SET extent_offset=1, length=length-1 WHERE inode={a}",
    "swap two names": "UPDATE dentry SET child = {a} + {b} - child WHERE child IN ({a},{b})",
    "graft a dentry": "UPDATE dentry SET parent={d} WHERE child={a}",
    "swap seals": "UPDATE inode SET seal=(SELECT seal FROM inode WHERE inode={b}) WHERE inode={a}",
}


@pytest.mark.parametrize("name", TAMPERINGS)
async def test_tampering_satellite_is_caught(tmp_path, autojump_clock, name):
    async with bucket_world(tmp_path) as world:
        numbers = await _write_two(world, tmp_path)
        await _tamper(world, TAMPERINGS[name].format(**numbers))
        assert await _read_two(world, tmp_path) == "caught"


async def test_seal_guard_switched_off_lets_tampering_through(
    tmp_path, autojump_clock, monkeypatch
):
    monkeypatch.setattr(keys.InodeKey, "verify_seal", lambda *args: None)
    async with bucket_world(tmp_path) as world:
        numbers = await _write_two(world, tmp_path)
        await _tamper(world, TAMPERINGS["change the mode"].format(**numbers))
        assert await _read_two(world, tmp_path) == "not caught"


async def _write_two(world, tmp_path):
    async with mounted(world, tmp_path) as m1:
        fs, root = m1.filesystem, m1.filesystem.root.number
        a = await write_file(fs, root, b"a", os.urandom(100_000))
        b = await write_file(fs, root, b"b", os.urandom(100_000))
        d = await fs.create_node(root, b"d", Kind.DIRECTORY, 0o755, CALLER)
        await m1.drain()
        await close_session(m1)
        return {"a": a.number, "b": b.number, "d": d.number}


async def _tamper(world, statement):
    for part in statement.split("; "):
        await world.database.write(lambda tx, part=part: tx.execute(part))


async def _read_two(world, tmp_path):
    from network.errors import IntegrityError

    async with mounted(world, tmp_path, "reader", read_only=True) as m2:
        fs = m2.filesystem
        try:
            for name in (b"a", b"b"):
                inode = await fs.directories.lookup(fs.root.number, name)
                await read_file(fs, inode)
        except IntegrityError:
            return "caught"
        except FsError:
            directory = await fs.directories.lookup(fs.root.number, b"d")
            try:
                await fs.directories.read(directory.number)
            except IntegrityError:
                return "caught"
    return "not caught"


async def test_large_log_is_replayed_in_several_batches_over_several_crashes(
    tmp_path, autojump_clock, monkeypatch
):
    """Each batch covers exactly its own records: a crash between two loses nothing."""
    async with bucket_world(tmp_path) as world:
        contents = {f"f{n}".encode(): os.urandom(1000 + n) for n in range(40)}
        async with mounted(world, tmp_path) as m1:
            fs = m1.filesystem
            await world.stop_satellite()
            for name, data in contents.items():
                inode = await write_file(fs, fs.root.number, name, data[:500])
            for name, data in contents.items():
                inode = await fs.directories.lookup(fs.root.number, name)
                handle = await fs.open(inode.number, os.O_WRONLY)
                await fs.write(handle, 500, data[500:])
                fs.release(handle)
            await fs.fsync(fs.root.number)
        await world.start_satellite()
        monkeypatch.setattr("dcsfs.fs.volume.BATCH_ITEMS_MAX", 15)
        for attempt in range(3):
            await trio.sleep(40)
            async with mounted(world, tmp_path) as m2:
                assert len(m2.volume.queue) > 1 or attempt
                while m2.writeback.flushed_batches < 2 and m2.volume.queue:
                    await m2.writeback.next_progress()  # then the machine stops
        monkeypatch.undo()
        async with mounted(world, tmp_path) as m3:
            await m3.drain()
            await close_session(m3)
        async with mounted(world, tmp_path, "fresh") as m4:
            fs = m4.filesystem
            names = {entry.name for entry in await fs.directories.read(fs.root.number)}
            assert names == set(contents)
            for name, data in contents.items():
                assert (
                    await read_file(fs, await fs.directories.lookup(fs.root.number, name)) == data
                )


async def test_replay_guard_switched_off_loses_the_data(tmp_path, autojump_clock, monkeypatch):
    """Without the log's replay the crash test above fails."""
    async with bucket_world(tmp_path) as world:
        async with mounted(world, tmp_path) as m1:
            fs = m1.filesystem
            await world.stop_satellite()
            inode = await write_file(fs, fs.root.number, b"new", b"staged")
            await fs.fsync(inode.number)
        await world.start_satellite()
        await trio.sleep(40)
        monkeypatch.setattr("dcsfs.cache.log.WriteLog.replay", lambda self: iter(()))
        async with mounted(world, tmp_path) as m2:
            with pytest.raises(FsError):
                await m2.filesystem.directories.lookup(m2.filesystem.root.number, b"new")


@pytest.mark.parametrize("is_sent", [False, True])
async def test_a_file_that_loses_its_name_while_it_is_looked_up_can_be_opened(
    tmp_path, autojump_clock, is_sent
):
    """The kernel finds a path, another process removes it, then the first one's call arrives."""
    async with bucket_world(tmp_path) as world, mounted(world, tmp_path) as m1:
        fs, root = m1.filesystem, m1.filesystem.root.number
        inode = await write_file(fs, root, b"f", b"content")
        inode.lookup_count += 1
        if is_sent:
            await m1.drain()
        await fs.unlink(root, b"f")
        await m1.drain()
        await fs.xattrs.set(inode.number, b"user.a", b"1")
        await fs.xattrs.remove(inode.number, b"user.a")
        await fs.set_attributes(inode.number, Changes(mode=0o600, size=3))
        handle = await fs.open(inode.number, os.O_RDWR)
        assert bytes(await fs.read(handle, 0, 100)) == b"con"
        fs.release(handle)
        fs.forget(inode.number, 1)
        assert inode.number not in m1.volume.inodes
        with trio.fail_after(60):
            await m1.drain()
        assert m1.writeback.last_error == ""
        request = m.InodeRequest(m1.client.api_key, m1.client.bucket, inode.number)
        with pytest.raises(NotFound):
            await m1.client.call(m.GET_INODE, request)


async def test_reads_while_the_log_is_trimmed_see_the_right_bytes(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world, mounted(world, tmp_path) as m1:
        fs, root = m1.filesystem, m1.filesystem.root.number
        data = os.urandom(3_000_000)
        inode = await write_file(fs, root, b"f", data)
        for number in range(5):
            handle = await fs.open(inode.number, os.O_RDWR)
            await fs.write(handle, number * 1000, b"new")
            data = data[: number * 1000] + b"new" + data[number * 1000 + 3 :]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(m1.drain)
                for _ in range(20):
                    assert bytes(await fs.read(handle, 0, 4_000_000)) == data
                    await trio.sleep(0.01)
            fs.release(handle)


async def test_a_time_that_cannot_be_stored_holds_nothing_up(tmp_path, autojump_clock):
    far = 2**34 * 10**9
    async with bucket_world(tmp_path) as world, mounted(world, tmp_path) as mount:
        fs, root = mount.filesystem, mount.filesystem.root.number
        inode = await write_file(fs, root, b"f", b"content")
        await fs.set_attributes(inode.number, Changes(atime_ns=-far, mtime_ns=far))
        await mount.drain()
        async with mounted(world, tmp_path, "other"):
            await fs.set_attributes(inode.number, Changes(atime_ns=far, mtime_ns=-far))
        found = await fs.directories.fresh(inode.number)
        assert (found.atime_ns, found.mtime_ns) == (2**63 - 1, -(2**63))


async def test_read_only_mount_follows_a_writer_and_never_mixes_versions(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world, mounted(world, tmp_path) as writer:
        fs, root = writer.filesystem, writer.filesystem.root.number
        inode = await write_file(fs, root, b"f", b"0" * 200_000)
        await writer.drain()
        async with mounted(world, tmp_path, "ro", read_only=True) as reader:
            other = reader.filesystem
            for number in range(1, 6):
                seen = await other.directories.lookup(other.root.number, b"f")
                handle = await fs.open(inode.number, os.O_WRONLY)
                await fs.write(handle, 0, b"%d" % number * 200_000)
                fs.release(handle)
                await writer.drain()  # after the reader's lookup, before it reads
                data = await read_file(other, seen)
                assert set(data) in ({48 + number - 1}, {48 + number})
                assert len(data) == 200_000


async def test_demand_flushes_one_batch_and_not_all_that_follow(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world, mounted(world, tmp_path) as m1:
        fs, root = m1.filesystem, m1.filesystem.root.number
        await write_file(fs, root, b"first", b"x" * 100_000)
        await m1.drain()
        assert m1.writeback.flushed_batches == 1
        handle, _ = await fs.create(root, b"second", 0o644, os.O_WRONLY, CALLER)
        for number in range(50):
            await fs.write(handle, number * 1000, b"y" * 1000)
            await trio.sleep(0.5)
        assert m1.writeback.flushed_batches == 1  # 25 s old: neither large nor aged nor asked for
        await trio.sleep(60)
        assert m1.writeback.flushed_batches == 2


async def test_a_stream_fetches_every_byte_once(tmp_path, autojump_clock, monkeypatch):
    # Sizes as tight as the real ones: a run fetched ahead must not go before it is read.
    monkeypatch.setattr(reader_module, "WINDOW_BYTES_MAX", 16 << 20)
    monkeypatch.setattr(reader_module, "TOP_UP_BYTES", 4 << 20)
    monkeypatch.setattr(reader_module, "SPAN_RUNS_MAX", 15)
    monkeypatch.setattr(reader_module, "RUNS_KEPT", 15)
    monkeypatch.setattr(reader_module, "REACH_BYTES_MAX", 12 << 20)
    monkeypatch.setattr(reader_module, "PASSED_RUNS_KEPT", 1)
    async with bucket_world(tmp_path) as world:
        data = os.urandom(60 << 20)
        async with mounted(world, tmp_path) as m1:
            await write_file(m1.filesystem, m1.filesystem.root.number, b"big", data, 1 << 20)
            await m1.drain()
            await close_session(m1)
        async with mounted(world, tmp_path, "other", read_only=True) as m2:
            inode = await m2.filesystem.directories.lookup(m2.filesystem.root.number, b"big")
            handle = await m2.filesystem.open(inode.number, os.O_RDONLY)
            for offset in range(0, len(data), 1 << 20):
                part = await m2.filesystem.read(handle, offset, 1 << 20)
                assert part == data[offset : offset + (1 << 20)]
                await trio.sleep(0.05)  # slower than the network
            received = m2.client.counters.received_bytes
            assert len(data) < received < 1.1 * len(data)
            assert m2.volume.clean.hits == 0

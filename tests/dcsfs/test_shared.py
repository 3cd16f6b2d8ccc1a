"""Several sessions on one bucket: the lease, write-through, conflict copies, coherence."""

import errno
import os
import socket
from contextlib import asynccontextmanager, suppress

import pytest
import trio

from dcsfs.fs.building import RENAME_EXCHANGE, RENAME_NOREPLACE, Caller, Changes
from dcsfs.fs.errors import FsError
from dcsfs.fs.mounted import VolumeOptions, close_session, open_volume
from dcsfs.fs.xattrs import XATTR_CREATE, XATTR_REPLACE
from network.errors import BucketBusy, InvalidArgument, Unavailable
from network.messages import Kind
from network.rpc import ConnectionPool
from tests.dcsfs.test_filesystem import (
    CALLER,
    bucket_world,
    grant_for,
    mounted,
    read_file,
    write_file,
)


class Cuttable:
    """A Runtime whose network can be taken away from one client alone."""

    def __init__(self, world):
        self._inner = world.runtime
        self.is_cut = False
        self._streams = []

    def __getattr__(self, name):
        return getattr(self._inner, name)

    async def connect(self, host, port):
        if self.is_cut:
            await trio.sleep(0.01)
            raise Unavailable("network is unreachable")
        stream = await self._inner.connect(host, port)
        self._streams.append(stream)
        return stream

    def cut(self):
        self.is_cut = True
        for stream in self._streams:
            stream.abort()
        self._streams.clear()


@asynccontextmanager
async def cuttable(world, tmp_path, name, **options):
    runtime = Cuttable(world)
    async with open_volume(
        runtime,
        ConnectionPool(runtime),
        grant_for(world),
        "photos",
        VolumeOptions(tmp_path / name, **options),
    ) as found:
        yield runtime, found


async def names(mount, number=None):
    number = mount.filesystem.root.number if number is None else number
    return sorted(item.name for item in await mount.filesystem.directories.read(number))


async def content(mount, name):
    fs = mount.filesystem
    inode = await fs.directories.lookup(fs.root.number, name)
    return await read_file(fs, inode)


async def save(mount, name, data):
    """open, write, close, as a program does."""
    fs = mount.filesystem
    handle, inode = await fs.create(fs.root.number, name, 0o644, os.O_WRONLY | os.O_TRUNC, CALLER)
    await fs.write(handle, 0, data)
    await fs.flush(handle)
    fs.release(handle)
    return inode


async def until(condition, seconds=60):
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 -- virtual seconds
            await trio.sleep(0.1)


async def code(operation, *arguments):
    with pytest.raises(FsError) as caught:
        await operation(*arguments)
    return errno.errorcode[caught.value.errno]


async def test_exclusive_mounts_share_with_nobody_and_say_with_whom(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world:
        async with mounted(world, tmp_path, is_exclusive=True):
            for exclusive in (True, False):
                with pytest.raises(BucketBusy, match=f"exclusively on .*process {os.getpid()}"):
                    async with mounted(world, tmp_path, "other", is_exclusive=exclusive):
                        pass
            with pytest.raises(
                InvalidArgument,
                match=f"in use by process {os.getpid()} on host {socket.gethostname()}",
            ):
                async with mounted(world, tmp_path):
                    pass
            async with mounted(world, tmp_path, "reader", read_only=True) as reading:
                with pytest.raises(FsError):
                    await reading.filesystem.create_node(1, b"x", Kind.FILE, 0o644, CALLER)
        await trio.sleep(70)
        async with mounted(world, tmp_path, "other"):
            with pytest.raises(BucketBusy, match="cannot be mounted exclusively"):
                async with mounted(world, tmp_path, is_exclusive=True):
                    pass


async def test_second_mount_sees_committed_view_while_content_is_staged(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world, mounted(world, tmp_path) as m1:
        fs = m1.filesystem
        assert not m1.volume.is_shared
        await save(m1, b"old", b"first")
        await m1.drain()
        await save(m1, b"old", b"second")
        data = os.urandom(3_000_000)
        for running in world.nodes:
            world.runtime.fault(running.host, running.port).stall = True  # content cannot go
        sub = await fs.create_node(fs.root.number, b"sub", Kind.DIRECTORY, 0o755, CALLER)
        await write_file(fs, fs.root.number, b"new", data)
        await fs.rename(fs.root.number, b"new", sub.number, b"newer", 0)
        started = trio.current_time()
        async with mounted(world, tmp_path, "other") as m2:
            assert trio.current_time() - started < 10
            assert m1.volume.is_shared
            assert m2.volume.is_shared
            assert await names(m2) == [b"old", b"sub"]
            sub2 = await m2.filesystem.directories.lookup(m2.filesystem.root.number, b"sub")
            newer = await m2.filesystem.directories.lookup(sub2.number, b"newer")
            assert newer.size == 0  # the last committed version: created, nothing in it
            assert await content(m2, b"old") == b"first"
            assert await content(m1, b"old") == b"second"
            for running in world.nodes:
                world.runtime.fault(running.host, running.port).stall = False
            await m1.drain()
            newer = await m2.filesystem.directories.lookup(sub2.number, b"newer")
            assert await read_file(m2.filesystem, newer) == data
            assert await content(m2, b"old") == b"second"


async def test_who_waits_for_older_content_sends_its_own_once(
    tmp_path, autojump_clock, monkeypatch
):
    async with bucket_world(tmp_path) as world, mounted(world, tmp_path) as m1:
        await save(m1, b"f", b"first")
        await m1.drain()
        older, newer = os.urandom(300_000), os.urandom(200_000)

        async def fail(*_):
            raise Unavailable("the nodes of this side are away")

        with monkeypatch.context() as patch:
            patch.setattr(m1.client, "upload_segment", fail)
            await save(m1, b"f", older)
            async with mounted(world, tmp_path, "other") as m2:
                fs = m2.filesystem
                inode = await fs.directories.lookup(fs.root.number, b"f")
                handle = await fs.open(inode.number, os.O_WRONLY)
                await fs.write(handle, 0, newer)
                m2.writeback.demand()
                await until(lambda: "another session has staged" in m2.writeback.last_error)
                sent = m2.client.counters.sent_bytes
                await trio.sleep(120)
                assert m2.client.counters.sent_bytes == sent
                patch.undo()
                await m1.drain()
                await m2.drain()
                fs.release(handle)
                merged = newer + older[len(newer) :]
                assert await content(m1, b"f") == await content(m2, b"f") == merged


async def test_changes_are_seen_by_the_other_mount_at_once(tmp_path, autojump_clock):
    async with (
        bucket_world(tmp_path) as world,
        mounted(world, tmp_path) as m1,
        mounted(world, tmp_path, "other") as m2,
    ):
        a, b = m1.filesystem, m2.filesystem
        root = a.root.number
        await trio.sleep(2)  # both are trusted now: they answer from memory
        for fs in (a, b):
            assert fs.volume.is_trusted
            await fs.directories.read(root)
        await save(m1, b"f", b"one")
        assert await content(m2, b"f") == b"one"
        await save(m2, b"f", b"two and more")
        assert await content(m1, b"f") == b"two and more"
        assert await code(a.create_node, root, b"f", Kind.FILE, 0o644, CALLER) == "EEXIST"
        inode = await a.directories.lookup(root, b"f")
        await a.set_attributes(inode.number, Changes(mode=0o600, uid=7))
        seen = await b.directories.fresh(inode.number)
        assert (seen.mode, seen.uid) == (0o600, 7)
        await b.set_attributes(inode.number, Changes(size=3))
        assert await content(m1, b"f") == b"two"
        await b.xattrs.set(inode.number, b"user.a", b"1")
        assert await a.xattrs.get(inode.number, b"user.a") == b"1"
        await a.xattrs.remove(inode.number, b"user.a")
        assert await b.xattrs.names(inode.number) == []
        directory = await b.create_node(root, b"d", Kind.DIRECTORY, 0o755, CALLER)
        await a.rename(root, b"f", (await a.directories.lookup(root, b"d")).number, b"g", 0)
        assert await names(m2) == [b"d"]
        assert await names(m2, directory.number) == [b"g"]
        assert await code(b.rmdir, root, b"d") == "ENOTEMPTY"
        await b.link(inode.number, root, b"h")
        assert (await a.directories.lookup(root, b"h")).nlink == 2
        await a.create_node(root, b"s", Kind.SYMLINK, 0o777, CALLER, target=b"there")
        assert (await b.directories.lookup(root, b"s")).symlink == b"there"
        await b.rename(root, b"s", root, b"h", RENAME_EXCHANGE)
        assert (await a.directories.lookup(root, b"h")).symlink == b"there"
        assert await code(a.rename, root, b"s", root, b"h", RENAME_NOREPLACE) == "EEXIST"
        await a.unlink(root, b"s")
        await a.unlink(directory.number, b"g")
        assert await code(b.directories.lookup, root, b"s") == "ENOENT"
        await b.rmdir(root, b"d")
        assert await names(m1) == [b"h"]
        assert (await a.directories.fresh(root)).nlink == 2


async def test_one_of_many_creates_an_attribute(tmp_path, autojump_clock):
    async with (
        bucket_world(tmp_path) as world,
        mounted(world, tmp_path) as m1,
        mounted(world, tmp_path, "other") as m2,
    ):
        inode = await save(m1, b"f", b"content")
        for mount in (m1, m2):
            await mount.filesystem.directories.lookup(m1.filesystem.root.number, b"f")
        outcomes = []

        async def attempt(mount, name, flags):
            try:
                await mount.filesystem.xattrs.set(inode.number, name, b"x", flags)
                outcomes.append((name, "done"))
            except FsError as error:
                outcomes.append((name, errno.errorcode[error.errno]))

        async with trio.open_nursery() as nursery:
            for number in range(20):
                for mount in (m1, m2, m1):
                    nursery.start_soon(attempt, mount, b"user.%d" % number, XATTR_CREATE)
        for number in range(20):
            found = sorted(result for name, result in outcomes if name == b"user.%d" % number)
            assert found == ["EEXIST", "EEXIST", "done"]
        await m2.filesystem.xattrs.remove(inode.number, b"user.0")
        outcomes.clear()
        await attempt(m1, b"user.0", XATTR_REPLACE)
        await attempt(m1, b"user.1", XATTR_REPLACE)
        assert [result for _, result in outcomes] == ["ENODATA", "done"]


async def test_one_of_many_wins_exclusive_creation(tmp_path, autojump_clock):
    async with (
        bucket_world(tmp_path) as world,
        mounted(world, tmp_path) as m1,
        mounted(world, tmp_path, "other") as m2,
    ):
        outcomes = []

        async def attempt(mount, name):
            try:
                handle, _ = await mount.filesystem.create(
                    mount.filesystem.root.number, name, 0o644, os.O_EXCL, CALLER
                )
                mount.filesystem.release(handle)
                outcomes.append((name, "made"))
            except FsError as error:
                outcomes.append((name, errno.errorcode[error.errno]))

        async with trio.open_nursery() as nursery:
            for number in range(20):
                for mount in (m1, m2, m1):
                    nursery.start_soon(attempt, mount, b"%d" % number)
        for number in range(20):
            found = sorted(result for name, result in outcomes if name == b"%d" % number)
            assert found == ["EEXIST", "EEXIST", "made"]


async def test_creating_what_another_mount_has_just_made(tmp_path, autojump_clock):
    """The kernel asks for a new file: it has looked, and checks no permissions of what is there."""
    async with (
        bucket_world(tmp_path) as world,
        mounted(world, tmp_path) as m1,
        mounted(world, tmp_path, "other") as m2,
    ):
        root, flags = m1.filesystem.root.number, os.O_RDWR | os.O_CREAT | os.O_TRUNC
        await trio.sleep(2)
        link = await m1.filesystem.create_node(
            root, b"link", Kind.SYMLINK, 0o777, CALLER, target=b"file"
        )
        await m1.filesystem.create_node(root, b"dir", Kind.DIRECTORY, 0o755, CALLER)
        await save(m1, b"file", b"content")
        stranger, administrator = Caller(2000, 2000, 0o022), Caller(0, 0, 0o022)
        create = m2.filesystem.create
        assert await code(create, root, b"link", 0o644, flags, CALLER) == "ESTALE"
        assert await code(create, root, b"dir", 0o644, flags, CALLER) == "EISDIR"
        assert await code(create, root, b"file", 0o644, flags, stranger) == "ESTALE"
        for caller in (CALLER, administrator):
            handle, _ = await create(root, b"file", 0o644, os.O_RDWR | os.O_CREAT, caller)
            assert bytes(await m2.filesystem.read(handle, 0, 100)) == b"content"
            m2.filesystem.release(handle)
        assert (await m1.filesystem.directories.fresh(link.number)).symlink == b"file"
        assert await code(m1.filesystem.open, link.number, flags) == "ESTALE"


async def test_open_file_of_one_mount_survives_removal_by_the_other(tmp_path, autojump_clock):
    async with (
        bucket_world(tmp_path) as world,
        mounted(world, tmp_path) as m1,
        mounted(world, tmp_path, "other") as m2,
    ):
        data = os.urandom(200_000)
        inode = await save(m1, b"f", data)
        handle = await m2.filesystem.open(
            (await m2.filesystem.directories.lookup(m2.filesystem.root.number, b"f")).number, 0
        )
        await m1.filesystem.unlink(m1.filesystem.root.number, b"f")
        assert (await m2.filesystem.directories.fresh(inode.number)).nlink == 0
        assert bytes(await m2.filesystem.read(handle, 0, 300_000)) == data
        await m1.drain()
        await close_session(m1)
        await until(lambda: not m2.volume.is_shared)  # alone again: the lease comes back
        assert bytes(await m2.filesystem.read(handle, 0, 300_000)) == data
        m2.filesystem.release(handle)
        await m2.drain()
        left = world.database.read(lambda tx: tx.number("SELECT count(*) FROM inode"))
        assert left == 1  # the root alone


async def test_the_last_mount_gets_the_lease_back_and_works_alone(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world, mounted(world, tmp_path) as m1:
        await save(m1, b"a", b"1")
        async with mounted(world, tmp_path, "other") as m2:
            await save(m2, b"b", b"2")
            await save(m1, b"a", b"11")
            await m2.drain()
            await close_session(m2)
        await until(lambda: not m1.volume.is_shared)
        before = m1.client.counters.satellite_transactions
        await save(m1, b"c", b"3")
        assert m1.client.counters.satellite_transactions == before  # answered here
        assert await names(m1) == [b"a", b"b", b"c"]
        assert [await content(m1, name) for name in (b"a", b"b", b"c")] == [b"11", b"2", b"3"]


async def test_satellite_restart_leaves_leases_and_coherence(tmp_path, autojump_clock):
    async with (
        bucket_world(tmp_path) as world,
        mounted(world, tmp_path) as m1,
        mounted(world, tmp_path, "other") as m2,
    ):
        await trio.sleep(2)
        await save(m1, b"f", b"one")
        assert await content(m2, b"f") == b"one"
        await world.stop_satellite()
        await trio.sleep(3)
        await world.start_satellite()
        await save(m1, b"f", b"two")
        assert await content(m2, b"f") == b"two"
        await save(m2, b"g", b"three")
        assert await content(m1, b"g") == b"three"
        assert m1.volume.is_shared
        assert m2.volume.is_shared


async def test_returning_mount_keeps_what_contradicts_others_beside(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world:
        async with cuttable(world, tmp_path, "away") as (runtime, m1):
            fs = m1.filesystem
            root = fs.root.number
            big = os.urandom(300_000)
            for name in (b"edited", b"removed there", b"same", b"moved"):
                await save(m1, name, name + big)
            assert (await content(m1, b"edited"))[:6] == b"edited"  # its map is loaded
            await m1.drain()
            runtime.cut()
            # Offline, under a lease that is about to go to another session.
            mine = os.urandom(100_000)
            for name in (b"edited", b"removed there"):
                inode = await fs.directories.lookup(root, name)
                handle = await fs.open(inode.number, os.O_WRONLY)
                await fs.write(handle, 0, mine)
                fs.release(handle)
            await save(m1, b"both", b"mine")
            await fs.rename(root, b"moved", root, b"target", 0)
            await save(m1, b"only mine", b"untouched by others")
            away = await fs.create_node(root, b"dir", Kind.DIRECTORY, 0o755, CALLER)
            await write_file(fs, away.number, b"inside", b"in my directory")
            await fs.fsync(root)
            async with mounted(world, tmp_path, "stayed") as m2:
                other = m2.filesystem
                await save(m2, b"edited", b"theirs")
                await other.unlink(root, b"removed there")
                await save(m2, b"both", b"theirs")
                await save(m2, b"target", b"theirs")
                await save(m2, b"dir", b"a file there")
                runtime.is_cut = False
                await until(lambda: m1.volume.is_shared and not m1.volume.has_backlog, 120)
                await m1.drain()
                for mount in (m1, m2):
                    found = await names(mount)
                    theirs = [name for name in found if b"(conflict " not in name]
                    assert theirs == [
                        b"both", b"dir", b"edited", b"only mine", b"same", b"target",
                    ]  # fmt: skip
                    assert await content(mount, b"edited") == b"theirs"
                    assert await content(mount, b"both") == b"theirs"
                    assert await content(mount, b"target") == b"theirs"
                    assert await content(mount, b"only mine") == b"untouched by others"
                    copies = {
                        name.split(b" (conflict ")[0]: name
                        for name in found
                        if b"(conflict " in name
                    }
                    assert sorted(copies) == [
                        b"both", b"dir", b"edited", b"removed there", b"target",
                    ]  # fmt: skip
                    assert await content(mount, copies[b"both"]) == b"mine"
                    assert await content(mount, copies[b"target"]) == b"moved" + big
                    merged = mine + (b"edited" + big)[len(mine) :]
                    assert await content(mount, copies[b"edited"]) == merged
                    kept = await content(mount, copies[b"removed there"])
                    assert kept[: len(mine)] == mine
                    copy = await mount.filesystem.directories.lookup(root, copies[b"dir"])
                    inside = await mount.filesystem.directories.lookup(copy.number, b"inside")
                    assert await read_file(mount.filesystem, inside) == b"in my directory"
                assert any("edited" in note for note in m1.writeback.conflicts.notes)


async def test_returning_after_a_crash_keeps_every_staged_byte(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world:
        async with cuttable(world, tmp_path, "away") as (runtime, m1):
            await save(m1, b"f", b"base")
            await m1.drain()
            runtime.cut()
            await save(m1, b"f", b"mine")
            await save(m1, b"g", b"mine too")
            await m1.filesystem.fsync(m1.filesystem.root.number)
        await trio.sleep(120)  # the session has expired
        async with mounted(world, tmp_path, "stayed") as m2:
            await save(m2, b"f", b"theirs")
            await save(m2, b"g", b"theirs too")
            async with mounted(world, tmp_path, "away") as m1:
                assert m1.replayed
                await m1.drain()
                found = await names(m2)
                copies = [name for name in found if b"(conflict " in name]
                assert [n for n in found if n not in copies] == [b"f", b"g"]
                assert await content(m2, b"g") == b"theirs too"
                both = {await content(m2, name) for name in [b"f", *copies]}
                assert {b"mine", b"theirs", b"mine too"} <= both


async def test_a_session_that_has_expired_is_opened_again_and_nobody_notices(
    tmp_path, autojump_clock
):
    """As after a partition that was over just before the session's life was."""
    async with (
        bucket_world(tmp_path) as world,
        mounted(world, tmp_path) as m1,
        mounted(world, tmp_path, "other") as m2,
    ):
        await trio.sleep(5)

        def end(tx):
            request = (m1.volume.session.session_id,)
            tx.execute("UPDATE session SET expires_s=0 WHERE session_id=?", request)

        for number in range(3):
            await world.database.write(end)
            await save(m1, b"%d" % number, b"content")
            assert await content(m2, b"%d" % number) == b"content"
        await world.database.write(end)
        await trio.sleep(40)  # without a change it is noticed by the next renewal
        lives = world.database.read(lambda tx: tx.all("SELECT expires_s FROM session"))
        assert min(lives)[0] > world.runtime.now_ns() // 10**9


async def test_vanished_mount_delays_the_next_one_by_the_recall_deadline(tmp_path, autojump_clock):
    async with bucket_world(tmp_path) as world, cuttable(world, tmp_path, "gone") as (runtime, m1):
        await save(m1, b"f", b"1")
        await m1.drain()
        runtime.cut()
        started = trio.current_time()
        async with mounted(world, tmp_path, "other") as m2:
            assert trio.current_time() - started < 12
            started = trio.current_time()
            await save(m2, b"g", b"2")
            assert trio.current_time() - started < 8
            await trio.sleep(70)  # the vanished session's life is over
            await until(lambda: not m2.volume.is_shared)


@pytest.mark.parametrize("seed", range(4))
async def test_random_schedule_on_two_mounts_matches_one_reference(tmp_path, autojump_clock, seed):
    async with bucket_world(tmp_path, seed=seed) as world:
        async with (
            cuttable(world, tmp_path, "a") as (_, m1),
            cuttable(world, tmp_path, "b") as (_, m2),
        ):
            state = seed + 1

            def draw(count):
                nonlocal state
                state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
                return (state >> 33) % count

            reference: dict[bytes, bytearray] = {}
            mounts = (m1, m2)
            for step in range(120):
                mount = mounts[draw(2)]
                fs, root = mount.filesystem, mount.filesystem.root.number
                name, other = b"f%d" % draw(5), b"f%d" % draw(5)
                choice = draw(7)
                if draw(10) == 0:
                    await trio.sleep(draw(4))
                try:
                    if choice == 0:
                        data = os.urandom(draw(70_000))
                        await save(mount, name, data)
                        reference[name] = bytearray(data)
                    elif choice == 1:
                        await fs.unlink(root, name)
                        del reference[name]
                    elif choice == 2:
                        await fs.rename(root, name, root, other, 0)
                        reference[other] = reference[name]
                        if other != name:
                            del reference[name]
                    elif choice in (3, 4):
                        inode = await fs.directories.lookup(root, name)
                        handle = await fs.open(inode.number, os.O_RDWR)
                        offset, data = draw(90_000), os.urandom(draw(20_000) + 1)
                        await fs.write(handle, offset, data)
                        await fs.flush(handle)
                        fs.release(handle)
                        target = reference[name]
                        target.extend(bytes(max(0, offset + len(data) - len(target))))
                        target[offset : offset + len(data)] = data
                    elif choice == 5:
                        inode = await fs.directories.lookup(root, name)
                        size = draw(100_000)
                        await fs.set_attributes(inode.number, Changes(size=size))
                        target = reference[name]
                        del target[size:]
                        target.extend(bytes(size - len(target)))
                    else:
                        found = await content(mount, name)
                        assert found == bytes(reference[name]), (step, name)
                except FsError as error:
                    assert error.errno == errno.ENOENT, step  # noqa: PT017 -- one of many cases
                    assert name not in reference, step
                for each in mounts:
                    assert await names(each) == sorted(reference), step
            for each in mounts:
                for name, data in reference.items():
                    assert await content(each, name) == bytes(data), name


class Jittery(Cuttable):
    """Every message takes a while, another one each time."""

    def __init__(self, world, seed):
        super().__init__(world)
        self._state = seed + 1

    async def connect(self, host, port):
        stream = await super().connect(host, port)
        send, receive = stream.send_all, stream.receive_into

        async def pause():
            self._state = (self._state * 6364136223846793005 + 1442695040888963407) % 2**64
            await trio.sleep((self._state >> 40) % 50 / 1000)

        async def slow_send(data):
            await pause()
            await send(data)

        async def slow_receive(target):
            count = await receive(target)
            await pause()
            return count

        stream.send_all, stream.receive_into = slow_send, slow_receive
        return stream


def view_of(inode):
    return (inode.kind, inode.mode, inode.uid, inode.nlink, inode.size, inode.mtime_ns)


@pytest.mark.parametrize("seed", range(6))
async def test_many_tasks_on_two_mounts_leave_both_with_the_truth(tmp_path, autojump_clock, seed):
    async with bucket_world(tmp_path, seed=seed) as world, trio.open_nursery() as nursery:
        mounts = []
        opened = trio.Event()

        async def keep(name, number):
            runtime = Jittery(world, 100 * seed + number)
            options = VolumeOptions(tmp_path / name)
            async with open_volume(
                runtime, ConnectionPool(runtime), grant_for(world), "photos", options
            ) as mount:
                mounts.append(mount)
                if len(mounts) == 2:
                    opened.set()
                await trio.sleep_forever()

        nursery.start_soon(keep, "a", 1)
        nursery.start_soon(keep, "b", 2)
        await opened.wait()
        await trio.sleep(3)
        root = mounts[0].filesystem.root.number
        places = [root]
        for name in (b"d0", b"d1"):
            made = await mounts[0].filesystem.create_node(root, name, Kind.DIRECTORY, 0o755, CALLER)
            places.append(made.number)

        async def work(mount, state):
            def draw(count):
                nonlocal state
                state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
                return (state >> 33) % count

            fs = mount.filesystem
            for _ in range(25):
                here, there = places[draw(3)], places[draw(3)]
                name, other = b"n%d" % draw(3), b"n%d" % draw(3)
                with suppress(FsError):
                    await fs.directories.lookup(here, name)
                try:
                    match draw(7):
                        case 0 | 1:
                            handle, _ = await fs.create(here, name, 0o644, os.O_WRONLY, CALLER)
                            await fs.write(handle, draw(5000), os.urandom(draw(3000) + 1))
                            await fs.flush(handle)
                            fs.release(handle)
                        case 2:
                            await fs.unlink(here, name)
                        case 3:
                            await fs.rename(here, name, there, other, draw(2) * RENAME_EXCHANGE)
                        case 4:
                            found = await fs.directories.lookup(here, name)
                            await fs.link(found.number, there, other)
                        case 5:
                            found = await fs.directories.lookup(here, name)
                            await fs.set_attributes(found.number, Changes(mode=draw(512)))
                        case 6:
                            found = await fs.directories.lookup(here, name)
                            await fs.xattrs.set(found.number, b"user.a", b"%d" % draw(9))
                except FsError as error:
                    expected = (errno.ENOENT, errno.EEXIST, errno.ESTALE, errno.EPERM)
                    assert error.errno in expected, error  # noqa: PT017 -- one of many

        async def forget():
            for _ in range(100):  # what is loaded meets what is changed
                await trio.sleep(0.07)
                mounts[0].volume.forget_everything()

        async with trio.open_nursery() as workers:
            workers.start_soon(forget)
            for number in range(8):
                # Odd seeds: all on one mount, which has only its own changes to be careful about.
                mount = mounts[number % 2 if seed % 2 == 0 else 0]
                workers.start_soon(work, mount, 1000 * seed + number)
        for mount in mounts:
            await mount.drain()
        async with mounted(world, tmp_path, "witness", read_only=True) as witness:
            for place in places:
                truth = await witness.filesystem.directories.read(place)
                for mount in mounts:
                    fs = mount.filesystem
                    assert [(e.name, e.child) for e in await fs.directories.read(place)] == [
                        (e.name, e.child) for e in truth
                    ]
                    for entry in truth:
                        known = await fs.directories.lookup(place, entry.name)
                        real = await witness.filesystem.directories.lookup(place, entry.name)
                        assert view_of(known) == view_of(real)
                        if real.kind is Kind.FILE:
                            assert await read_file(fs, known) == await read_file(
                                witness.filesystem, real
                            )
                            assert await fs.xattrs.names(
                                known.number
                            ) == await witness.filesystem.xattrs.names(real.number)
        nursery.cancel_scope.cancel()

"""Put and get against real nodes and a real satellite on the memory network."""

import os

import pytest
import trio

from network import messages as m
from network.download import SegmentHandle, SegmentReader
from network.errors import IntegrityError, NotEnoughNodes, TooFewShares
from network.ids import Hash
from network.limits import RECORD_BYTES
from network.redundancy import RedundancyScheme
from network.transfer import put_segment
from tests.planet import planet


async def open_bucket(world, pool):
    root = m.NewInode(1, 1, m.Kind.DIRECTORY, 0, m.Attributes(0o755, 0, 0, 0, 0, 0), b"", b"seal")
    await pool.call(
        world.address,
        m.CREATE_BUCKET,
        m.CreateBucketRequest(world.api_key, "photos", os.urandom(16), b"wrapped", root),
    )
    return await pool.call(
        world.address,
        m.OPEN_SESSION,
        m.OpenSessionRequest(world.api_key, "photos", b"c" * 16, "host", 1, False),
    )


async def upload(world, pool, session, data, sequence=1):
    grant = await pool.call(
        world.address,
        m.BEGIN_SEGMENT,
        m.BeginSegmentRequest(world.api_key, session.session_id, len(data), ()),
    )
    s = grant.scheme
    scheme = RedundancyScheme(s.required, s.repair, s.success, s.total)
    result = await put_segment(
        pool,
        data=memoryview(data),
        scheme=scheme,
        grants=grant.grants,
        order_key=grant.order_key,
    )
    put = m.PutSegment(grant.segment_id, len(data), result.segment_root, result.pieces, ())
    reply = await pool.call(
        world.address,
        m.APPLY,
        m.ApplyRequest(
            world.api_key,
            session.session_id,
            sequence,
            Hash(bytes([sequence]) * 32),
            True,
            False,
            (put,),
        ),
    )
    assert [item.code for item in reply.results] == [0], reply
    return grant.segment_id, result


async def open_segment(world, pool, segment_id):
    reply = await pool.call(
        world.address,
        m.OPEN_SEGMENTS,
        m.OpenSegmentsRequest(world.api_key, "photos", (segment_id,)),
    )
    return SegmentHandle(reply.segments[0])


async def read(world, pool, handle, start, end, on_bad=lambda grant, reason: None):
    reader = SegmentReader(pool, handle, on_bad)
    with trio.fail_after(60):
        return b"".join(await reader.read(start, end))


SIZES = [1, 3, 5000, 4 * RECORD_BYTES, 4 * RECORD_BYTES + 1, 9 * RECORD_BYTES + 17]


@pytest.mark.parametrize("size", SIZES)
async def test_segment_round_trip_whole_and_ranges(tmp_path, autojump_clock, size):
    async with planet(tmp_path) as world:
        pool = world.pool()
        session = await open_bucket(world, pool)
        data = os.urandom(size)
        segment_id, result = await upload(world, pool, session, data)
        assert len(result.pieces) == 8
        handle = await open_segment(world, pool, segment_id)
        assert await read(world, pool, handle, 0, size) == data
        for start, end in ((0, 1), (size // 2, size), (size - 1, size)):
            if start < end:
                assert await read(world, pool, handle, start, end) == data[start:end]


async def test_put_dead_and_stalled_nodes_are_replaced(tmp_path, autojump_clock):
    async with planet(tmp_path, nodes=13, redundancy="4/5/8/13") as world:
        pool = world.pool()
        session = await open_bucket(world, pool)
        for running in world.nodes[:3]:
            world.kill_node(running)
        stalled = world.nodes[3]
        world.runtime.fault(stalled.host, stalled.port).stall = True
        _, result = await upload(world, pool, session, os.urandom(700_000))
        assert len(result.pieces) == 8
        stored = {piece.receipt.node_id for piece in result.pieces}
        assert not stored & {running.node.identity.id for running in world.nodes[:3]}


async def test_put_below_the_durability_line_raises(tmp_path, autojump_clock):
    async with planet(tmp_path, nodes=8, redundancy="4/5/8/8") as world:
        pool = world.pool()
        session = await open_bucket(world, pool)
        for running in world.nodes[:4]:
            world.kill_node(running)
        with pytest.raises(NotEnoughNodes):
            await upload(world, pool, session, os.urandom(700_000))


async def test_put_degraded_commit_at_the_line(tmp_path, autojump_clock):
    async with planet(tmp_path, nodes=8, redundancy="4/5/8/8") as world:
        pool = world.pool()
        session = await open_bucket(world, pool)
        world.kill_node(world.nodes[0])
        _, result = await upload(world, pool, session, os.urandom(700_000))
        assert len(result.pieces) == 7


async def test_get_any_k_and_one_less(tmp_path, autojump_clock):
    async with planet(tmp_path, nodes=8, redundancy="4/5/8/8") as world:
        pool = world.pool()
        session = await open_bucket(world, pool)
        data = os.urandom(9 * RECORD_BYTES + 17)
        segment_id, _ = await upload(world, pool, session, data)
        for running in world.nodes[:4]:
            world.kill_node(running)
        handle = await open_segment(world, pool, segment_id)
        assert await read(world, pool, handle, 0, len(data)) == data
        assert await read(world, pool, handle, 70_000, 70_001) == data[70_000:70_001]
        world.kill_node(world.nodes[4])
        with pytest.raises(TooFewShares):
            await read(world, pool, await open_segment(world, pool, segment_id), 0, len(data))


async def test_get_stalled_nodes_are_hedged(tmp_path, autojump_clock):
    async with planet(tmp_path, nodes=8, redundancy="4/5/8/8") as world:
        pool = world.pool()
        session = await open_bucket(world, pool)
        data = os.urandom(9 * RECORD_BYTES + 17)
        segment_id, _ = await upload(world, pool, session, data)
        for running in world.nodes[:3]:
            world.runtime.fault(running.host, running.port).stall = True
        handle = await open_segment(world, pool, segment_id)
        start = trio.current_time()
        assert await read(world, pool, handle, 0, len(data)) == data
        assert trio.current_time() - start < 5


def corrupt(running):
    """Flip bytes in every stored piece of a node, as a failing disk would."""
    for file, offset, size in running.node.store.spans():
        path = running.directory / "pieces" / f"{file:08d}.log"
        with path.open("r+b") as handle:
            handle.seek(offset + size // 2)
            byte = handle.read(1)
            handle.seek(offset + size // 2)
            handle.write(bytes([byte[0] ^ 255]))


async def test_get_corrupt_node_is_named_and_read_succeeds(tmp_path, autojump_clock):
    async with planet(tmp_path, nodes=8, redundancy="4/5/8/8") as world:
        pool = world.pool()
        session = await open_bucket(world, pool)
        data = os.urandom(4 * 3 * RECORD_BYTES)
        segment_id, result = await upload(world, pool, session, data)
        bad_id = result.pieces[1].receipt.node_id  # a data index
        corrupt(world.node_by_id(bad_id))
        named = []
        handle = await open_segment(world, pool, segment_id)
        got = await read(
            world, pool, handle, 0, len(data), lambda g, reason: named.append(g.limit.node_id)
        )
        assert got == data
        assert named == [bad_id]


async def test_share_hash_guard_switched_off_returns_wrong_bytes(
    tmp_path, autojump_clock, monkeypatch
):
    """The guard's own test fails without the guard: see the test above."""
    monkeypatch.setattr("network.piecehash.verify_share", lambda *args: None)
    async with planet(tmp_path, nodes=8, redundancy="4/5/8/8") as world:
        pool = world.pool()
        session = await open_bucket(world, pool)
        data = os.urandom(4 * 3 * RECORD_BYTES)
        segment_id, result = await upload(world, pool, session, data)
        corrupt(world.node_by_id(result.pieces[1].receipt.node_id))
        handle = await open_segment(world, pool, segment_id)
        assert await read(world, pool, handle, 0, len(data)) != data


async def test_get_over_a_slow_link_asks_nobody_twice(tmp_path, autojump_clock):
    async with planet(tmp_path, nodes=8, redundancy="4/5/8/8") as world:
        pool = world.pool()
        session = await open_bucket(world, pool)
        data = os.urandom(100 * RECORD_BYTES)
        segment_id, _ = await upload(world, pool, session, data)
        for running in world.nodes:  # 25 shares from each, 8 a frame: 1.6 s for the whole read
            world.runtime.fault(running.host, running.port).delay_s = 0.4
        handle = await open_segment(world, pool, segment_id)
        before = trio.current_time()
        assert await read(world, pool, handle, 0, len(data)) == data
        assert trio.current_time() - before > 1.5
        served = sum(running.node.served_bytes for running in world.nodes)
        assert served == len(data)


async def test_get_a_node_that_stops_in_the_middle_is_replaced(tmp_path, autojump_clock):
    async with planet(tmp_path, nodes=8, redundancy="4/5/8/8") as world:
        pool = world.pool()
        session = await open_bucket(world, pool)
        data = os.urandom(100 * RECORD_BYTES)
        segment_id, result = await upload(world, pool, session, data)
        handle = await open_segment(world, pool, segment_id)
        first = world.node_by_id(result.pieces[0].receipt.node_id)
        fault = world.runtime.fault(first.host, first.port)
        fault.delay_s = 0.3
        async with trio.open_nursery() as nursery:

            async def stop_it() -> None:
                await trio.sleep(0.4)
                fault.stall = True

            nursery.start_soon(stop_it)
            before = trio.current_time()
            assert await read(world, pool, handle, 0, len(data)) == data
        assert trio.current_time() - before < 3


async def test_stream_hands_over_stripes_before_the_rest_has_come(tmp_path, autojump_clock):
    async with planet(tmp_path, nodes=8, redundancy="4/5/8/8") as world:
        pool = world.pool()
        session = await open_bucket(world, pool)
        data = os.urandom(100 * RECORD_BYTES)
        segment_id, _ = await upload(world, pool, session, data)
        for running in world.nodes:
            world.runtime.fault(running.host, running.port).delay_s = 0.3
        handle = await open_segment(world, pool, segment_id)
        times, found = [], bytearray()

        async def deliver(parts):
            times.append(trio.current_time())
            found.extend(b"".join(parts))

        await SegmentReader(pool, handle).stream(5, len(data) - 5, deliver)
        assert bytes(found) == data[5:-5]
        assert times[-1] - times[0] > 0.5


async def test_an_error_of_the_receiver_ends_a_stream(tmp_path, autojump_clock):
    async with planet(tmp_path, nodes=8, redundancy="4/5/8/8") as world:
        pool = world.pool()
        session = await open_bucket(world, pool)
        segment_id, _ = await upload(world, pool, session, os.urandom(700_000))
        handle = await open_segment(world, pool, segment_id)

        async def refuse(parts):
            raise IntegrityError("not what it should be")

        with pytest.raises(IntegrityError, match="not what"), trio.fail_after(5):
            await SegmentReader(pool, handle).stream(0, 700_000, refuse)

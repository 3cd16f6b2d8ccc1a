"""Every parser of what a peer, a user or a disk may hold: an answer or the right error."""

import contextlib

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from dcsfs.cli.common import parse_address
from dcsfs.cli.mount_cmd import parse_options
from dcsfs.uplink.packing import decode_directory
from network import messages as m
from network import piecemessages as p
from network.codec import unpack
from network.errors import DcsError, IntegrityError, InvalidArgument, ProtocolError
from network.identity import Certificate, Identity, PeerAddress
from network.ids import NodeID, SegmentID
from network.macaroon import Caveat
from network.method import Method
from network.redundancy import RedundancyScheme
from network.rpc import ConnectionPool, Server
from network.testing.memory import MemoryRuntime
from network.units import parse_size
from node.host import Fault
from node.store import PieceRecord
from satellite.overlay import failure_domain

IDENTITY = Identity(bytes(32), bytes(8), bytes(range(32)))


@given(st.text(max_size=80))
def test_text_parsers_raise_invalid_argument_only(text):
    for parser in (
        parse_size, PeerAddress.parse, NodeID.parse, RedundancyScheme.parse, parse_address,
        Fault.parse,
    ):  # fmt: skip
        with contextlib.suppress(InvalidArgument):
            parser(text)
    assert isinstance(parse_options((text,)), dict)
    assert isinstance(failure_domain(text), str)


@given(st.binary(max_size=300))
def test_binary_parsers_raise_their_error_only(data):
    with contextlib.suppress(IntegrityError):
        Certificate.decode(data)
    with contextlib.suppress(InvalidArgument):
        Identity.decode(data)
    with contextlib.suppress(IntegrityError):
        decode_directory(bytes(32), SegmentID(bytes(16)), data)
    methods = [v for module in (m, p) for v in vars(module).values() if isinstance(v, Method)]
    assert len(methods) == 26
    types = {t for method in methods for t in (method.request, method.response)}
    for cls in (*types, PieceRecord, Caveat, p.FinishPiece, p.PieceInfo):
        if cls.__name__ != "StreamEnd":
            with contextlib.suppress(ProtocolError):
                unpack(cls, data)


async def _exchange(data):
    """Send bytes to a real server, raw and after a handshake; it must serve the next caller."""
    runtime = MemoryRuntime()
    method = Method(16, m.Empty, m.Empty)

    async def handler(call):
        return m.Empty()

    server = Server(IDENTITY, {16: (method, handler)}, 4096)
    listener = await runtime.listen("10.0.0.9", 1)
    address = PeerAddress(IDENTITY.id, "10.0.0.9", 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, listener)
        raw = await runtime.connect("10.0.0.9", 1)
        with contextlib.suppress(DcsError):
            await raw.send_all(data)
        raw.abort()
        pool = ConnectionPool(runtime)
        with contextlib.suppress(DcsError):
            async with pool.lease(address) as stream:
                await stream.send(16, data[:4000])
                with trio.move_on_after(1):
                    await stream.receive()
        with contextlib.suppress(DcsError):
            async with pool.lease(address) as stream:
                await stream._raw.send_all(data)
                raise ProtocolError("enough")
        assert await pool.call(address, method, m.Empty()) == m.Empty()
        pool.close()
        nursery.cancel_scope.cancel()


@settings(max_examples=30)
@given(st.binary(min_size=1, max_size=500))
def test_server_survives_any_bytes_before_and_inside_the_tunnel(data):
    trio.run(_exchange, data)


def test_frame_over_its_limit_is_refused():
    async def run():
        runtime = MemoryRuntime()
        server = Server(IDENTITY, {}, 64)
        listener = await runtime.listen("10.0.0.9", 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve, listener)
            pool = ConnectionPool(runtime)
            with pytest.raises(DcsError):
                async with pool.lease(PeerAddress(IDENTITY.id, "10.0.0.9", 1)) as stream:
                    await stream.send(16, bytes(65))
                    await stream.receive()
            nursery.cancel_scope.cancel()

    trio.run(run)


def test_dialler_accepts_nobody_else():
    async def run():
        runtime = MemoryRuntime()
        listener = await runtime.listen("10.0.0.9", 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Server(IDENTITY, {}, 64).serve, listener)
            pool = ConnectionPool(runtime)
            with pytest.raises(ProtocolError, match="answered"):
                async with pool.lease(PeerAddress(NodeID(bytes(32)), "10.0.0.9", 1)):
                    pass
            nursery.cancel_scope.cancel()

    trio.run(run)

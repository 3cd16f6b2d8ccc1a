"""Typed calls over the secure transport: one call at a time on a connection, pooled connections.

A request frame's kind is the method's code; the reply's kind is OK or ERROR. Streaming methods
exchange further frames on the same connection before the reply. A call that is cancelled or fails
half-way aborts its connection; the server sees that and cancels nothing else.
"""

import logging
import struct
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Generic

import trio

from network.codec import pack, unpack
from network.errors import DcsError, Internal, ProtocolError, Unavailable, error_from_wire
from network.identity import Identity, PeerAddress
from network.ids import NodeID
from network.limits import (
    CONNECTIONS_PER_SERVER_MAX,
    ERROR_TEXT_BYTES_MAX,
    FRAME_HEADER_BYTES_MAX,
    IDLE_CONNECTION_S,
    POOL_IDLE_S,
    POOLED_PER_ADDRESS_MAX,
    RPC_DEADLINE_S,
)
from network.method import Method, Request, Response, StreamEnd
from network.runtime import Listener, Runtime, with_deadline
from network.transport import Frame, OutputBuffers, SecureStream, accept_secure, connect_secure

log = logging.getLogger(__name__)

OK = 0
ERROR = 1
DATA = 2
"""Kinds below 16 are replies and stream frames; methods start at 16."""
_CODE = struct.Struct(">H")


def encode_error(error: DcsError) -> bytes:
    """u16 error number, then the text in UTF-8, cut to its limit."""
    return _CODE.pack(error.code) + str(error).encode()[:ERROR_TEXT_BYTES_MAX]


def check_reply(frame: Frame) -> Frame:
    """Return an OK or DATA frame; raise the peer's error for an ERROR frame."""
    if frame.kind == ERROR:
        if len(frame.header) < 2:
            raise ProtocolError("error frame is too short")
        raise error_from_wire(
            _CODE.unpack_from(frame.header)[0], frame.header[2:].decode(errors="replace")
        )
    if frame.kind not in (OK, DATA):
        raise ProtocolError(f"reply has kind {frame.kind}")
    return frame


class Call(Generic[Request]):
    """One request at the server; streaming handlers use `stream` directly."""

    def __init__(self, stream: SecureStream, request: Request) -> None:
        self.stream = stream
        self.request = request

    @property
    def peer_id(self) -> NodeID | None:
        """The caller's certified ID, None for an anonymous uplink."""
        return self.stream.peer.node_id if self.stream.peer else None


Handler = Callable[[Call[Any]], Awaitable[object]]
"""Returns the response message, or None when it has sent its reply itself."""


class Server:
    """Accepts connections and dispatches calls to handlers by method code."""

    def __init__(
        self,
        identity: Identity,
        handlers: Mapping[int, tuple[Method[Any, Any], Handler]],
        header_bytes_max: int,
    ) -> None:
        self._identity = identity
        self._handlers = handlers
        self._header_bytes_max = header_bytes_max
        self._outputs = OutputBuffers()
        self.connections = 0

    async def serve(self, listener: Listener) -> None:
        """Serve until cancelled or the listener is closed; every connection is a child task."""
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    try:
                        raw = await listener.accept()
                    except Unavailable:
                        return
                    if self.connections >= CONNECTIONS_PER_SERVER_MAX:
                        raw.abort()
                        continue
                    nursery.start_soon(self._serve_connection, raw)
        finally:
            listener.close()

    async def _serve_connection(self, raw: Any) -> None:
        self.connections += 1
        try:
            stream = await accept_secure(raw, self._identity, self._header_bytes_max, self._outputs)
            try:
                while await self._serve_call(stream):
                    pass
            finally:
                stream.abort()
        except DcsError as error:
            log.debug("connection ended: %s", error)
        except Exception:
            log.exception("connection failed")
        finally:
            self.connections -= 1
            raw.abort()

    async def _serve_call(self, stream: SecureStream) -> bool:
        """Serve one call; False when the connection must not be used again."""
        frame = await with_deadline(IDLE_CONNECTION_S, "next request", stream.receive)
        entry = self._handlers.get(frame.kind)
        if entry is None:
            error: DcsError = ProtocolError(f"unknown method {frame.kind}")
            await stream.send(ERROR, encode_error(error))
            return False
        method, handler = entry
        try:
            call = Call(stream, unpack(method.request, frame.header))
            response = await with_deadline(method.deadline_s, "call", lambda: handler(call))
        except (ProtocolError, Unavailable) as failure:
            await self._send_error(stream, failure)
            return False
        except DcsError as failure:
            await self._send_error(stream, failure)
            return method.response is not StreamEnd
        except Exception:
            log.exception("handler failed: method=%s", frame.kind)
            await self._send_error(stream, Internal("internal error; the peer's log has it"))
            return False
        if response is not None:
            header = pack(response)
            await with_deadline(
                method.deadline_s, "sending the reply", lambda: stream.send(OK, header)
            )
        return True

    async def _send_error(self, stream: SecureStream, error: DcsError) -> None:
        await with_deadline(
            RPC_DEADLINE_S, "sending an error", lambda: stream.send(ERROR, encode_error(error))
        )


class ConnectionPool:
    """Client side: secure connections by address, reused when idle, one call each at a time."""

    def __init__(self, runtime: Runtime, identity: Identity | None = None) -> None:
        self.runtime = runtime
        self._identity = identity
        self._idle: dict[PeerAddress, list[tuple[float, SecureStream]]] = defaultdict(list)
        self._outputs = OutputBuffers()

    @asynccontextmanager
    async def lease(self, address: PeerAddress) -> AsyncIterator[SecureStream]:
        """Lend a connection; it returns to the pool on a clean exit and is aborted otherwise.

        Raises Unavailable, DeadlineExceeded or ProtocolError when none can be made.
        """
        stream = self._take(address)
        if stream is None:
            raw = await self.runtime.connect(address.host, address.port)
            stream = await connect_secure(
                raw, address.id, self._identity, FRAME_HEADER_BYTES_MAX, self._outputs
            )
        try:
            yield stream
        except BaseException:
            stream.abort()
            raise
        self._give(address, stream)

    def _take(self, address: PeerAddress) -> SecureStream | None:
        idle = self._idle.get(address, [])
        while idle:
            since, stream = idle.pop()
            if trio.current_time() - since < POOL_IDLE_S and not stream.is_stale():
                return stream
            stream.abort()
        return None

    def _give(self, address: PeerAddress, stream: SecureStream) -> None:
        idle = self._idle[address]
        if len(idle) >= POOLED_PER_ADDRESS_MAX:
            idle.pop(0)[1].abort()
        idle.append((trio.current_time(), stream))

    async def call(
        self, address: PeerAddress, method: Method[Request, Response], request: Request
    ) -> Response:
        """One unary call with the method's deadline; raises the peer's error or Unavailable."""

        async def run() -> Response:
            failure: DcsError | None = None
            async with self.lease(address) as stream:
                await stream.send(method.code, pack(request))
                frame = await stream.receive()
                try:
                    check_reply(frame)
                except ProtocolError:
                    raise
                except DcsError as error:
                    failure = error  # an error reply leaves the connection usable
            if failure is not None:
                raise failure
            return unpack(method.response, frame.header)

        return await with_deadline(
            method.deadline_s + 1.0, f"call to {address.host}:{address.port}", run
        )

    def close(self) -> None:
        """Abort all idle connections."""
        for idle in self._idle.values():
            for _, stream in idle:
                stream.abort()
        self._idle.clear()

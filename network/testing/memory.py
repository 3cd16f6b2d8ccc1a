"""`MemoryRuntime`: the Runtime of a whole network in one trio run.

Offloaded work runs inline, so that trio's virtual clock (MockClock with autojump) never jumps
while a thread works. Faults are set per address: refuse, stall, or a delay per send.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar, TypeVarTuple

import trio

from network.errors import Unavailable

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_PIPE_BYTES_MAX = 1 << 20
_EPOCH_NS = 1_700_000_000_000_000_000


@dataclass(slots=True)
class Fault:
    """How an address misbehaves."""

    refuse: bool = False
    stall: bool = False
    delay_s: float = 0.0


class _Pipe:
    """One direction of a connection."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.closed = False
        self.lot = trio.lowlevel.ParkingLot()

    def close(self) -> None:
        self.closed = True
        self.lot.unpark_all()


class MemoryStream:
    """A RawStream over two pipes."""

    def __init__(self, incoming: _Pipe, outgoing: _Pipe, fault: Callable[[], Fault]) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._fault = fault

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See RawStream."""
        await trio.lowlevel.checkpoint()
        if self._fault().stall:
            await trio.sleep_forever()
        if self._fault().delay_s:
            await trio.sleep(self._fault().delay_s)
        while len(self._outgoing.data) > _PIPE_BYTES_MAX and not self._outgoing.closed:
            await self._outgoing.lot.park()
        if self._outgoing.closed:
            raise Unavailable("connection was closed by the peer")
        self._outgoing.data += data
        self._outgoing.lot.unpark_all()

    async def receive_into(self, target: memoryview) -> int:
        """See RawStream."""
        await trio.lowlevel.checkpoint()
        while not self._incoming.data:
            if self._incoming.closed:
                return 0
            await self._incoming.lot.park()
        count = min(len(target), len(self._incoming.data))
        target[:count] = self._incoming.data[:count]
        del self._incoming.data[:count]
        self._incoming.lot.unpark_all()
        return count

    def has_input(self) -> bool:
        """See RawStream."""
        return bool(self._incoming.data) or self._incoming.closed

    def abort(self) -> None:
        """See RawStream."""
        self._incoming.close()
        self._outgoing.close()


class MemoryListener:
    """A Listener in the memory network."""

    def __init__(self, runtime: "MemoryRuntime", host: str, port: int) -> None:
        self._runtime = runtime
        self.host = host
        self._port = port
        self._send, self._receive = trio.open_memory_channel[MemoryStream](1024)

    @property
    def port(self) -> int:
        """See Listener."""
        return self._port

    async def accept(self) -> MemoryStream:
        """See Listener."""
        try:
            return await self._receive.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError) as error:
            raise Unavailable("listener is closed") from error

    def offer(self, stream: MemoryStream) -> None:
        """Queue an incoming connection."""
        self._send.send_nowait(stream)

    def close(self) -> None:
        """See Listener."""
        self._runtime.listeners.pop((self.host, self._port), None)
        self._send.close()


@dataclass
class MemoryRuntime:
    """A Runtime whose world is this process; one instance is shared by all peers of a test."""

    seed: int = 0
    listeners: dict[tuple[str, int], MemoryListener] = field(default_factory=dict)
    faults: dict[tuple[str, int], Fault] = field(default_factory=dict)
    refused: int = 0
    _counter: int = 0
    _next_port: int = 40000
    _streams: dict[tuple[str, int], list[MemoryStream]] = field(default_factory=dict)

    def now_ns(self) -> int:
        """Trio's clock on a fixed epoch."""
        return _EPOCH_NS + int(trio.current_time() * 1e9)

    def random_bytes(self, count: int) -> bytes:
        """A stream that depends on the seed only."""
        self._counter += 1
        name = f"{self.seed}:{self._counter}".encode()
        return hashlib.shake_256(name).digest(count)

    async def offload(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run inline."""
        await trio.lowlevel.checkpoint()
        return function(*args)

    def fault(self, host: str, port: int) -> Fault:
        """The address's faults, to be changed in place."""
        return self.faults.setdefault((host, port), Fault())

    def cut(self, host: str, port: int) -> None:
        """Refuse new connections to an address and break those that exist."""
        self.fault(host, port).refuse = True
        for stream in self._streams.pop((host, port), []):
            stream.abort()

    async def connect(self, host: str, port: int) -> MemoryStream:
        """See Runtime."""
        await trio.lowlevel.checkpoint()
        listener = self.listeners.get((host, port))
        if listener is None or self.fault(host, port).refuse:
            self.refused += 1
            raise Unavailable(f"cannot connect to {host}:{port}: connection refused")
        there, back = _Pipe(), _Pipe()
        near = MemoryStream(back, there, Fault)
        listener.offer(MemoryStream(there, back, lambda: self.fault(host, port)))
        self._streams.setdefault((host, port), []).append(near)
        return near

    async def listen(self, host: str, port: int) -> MemoryListener:
        """See Runtime."""
        await trio.lowlevel.checkpoint()
        if port == 0:
            self._next_port += 1
            port = self._next_port
        if (host, port) in self.listeners:
            raise Unavailable(f"cannot listen on {host}:{port}: address in use")
        listener = self.listeners[(host, port)] = MemoryListener(self, host, port)
        return listener

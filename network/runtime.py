"""The seam for everything that is not deterministic: clock, entropy, threads, sockets.

`SystemRuntime` is the real one; `network.testing.memory.MemoryRuntime` runs a whole network in
one trio run. Nothing else in the four packages reads a clock or starts a thread for work.
"""

import os
import socket
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Protocol, TypeVar, TypeVarTuple

import trio

from network.errors import DeadlineExceeded, Unavailable
from network.limits import CONNECT_DEADLINE_S

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_OFFLOAD_THREADS_MAX = 6
_CLOCK_REALTIME_COARSE = 5
"""clock_gettime(2), Linux: Python's `time` has no name for it."""
RECEIVES_PER_TURN = 2
"""At 256 KiB each: about half a millisecond with the work that follows."""


class RawStream(Protocol):
    """An ordered byte stream; one sender and one receiver task at a time."""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything; raises Unavailable. If cancelled, the stream must be aborted."""

    async def receive_into(self, target: memoryview) -> int:
        """Receive at least one byte; 0 at the end of the stream; raises Unavailable."""

    def has_input(self) -> bool:
        """Whether bytes or an end of stream wait: an idle connection with input is stale."""

    def abort(self) -> None:
        """Close at once, losing what is buffered; idempotent."""


class Listener(Protocol):
    """A bound address."""

    @property
    def port(self) -> int:
        """The port that was bound, when 0 was asked for."""

    async def accept(self) -> RawStream:
        """Wait for a connection."""

    def close(self) -> None:
        """Stop listening; a waiting `accept` raises Unavailable."""


class Runtime(Protocol):
    """What a peer may know of the world outside its own state."""

    def now_ns(self) -> int:
        """Unix time in nanoseconds."""

    def random_bytes(self, count: int) -> bytes:
        """Unpredictable bytes."""

    async def offload(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run a blocking or GIL-heavy function in a thread; if cancelled it still finishes."""

    async def connect(self, host: str, port: int) -> RawStream:
        """Open a connection; raises Unavailable or DeadlineExceeded."""

    async def listen(self, host: str, port: int) -> Listener:
        """Bind an address; raises Unavailable when it is taken."""


def now_s(runtime: Runtime) -> int:
    """Unix time in seconds."""
    return runtime.now_ns() // 1_000_000_000


class SocketStream:
    """A TCP connection: non-blocking calls, and a wait only where the kernel says so.

    trio's own socket methods go through the scheduler twice a call; here piece data pays for it
    once per frame sent and once per RECEIVES_PER_TURN buffers received.
    """

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = socket.socket(fileno=sock.detach())
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._receives = 0

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See RawStream. A checkpoint first, so that many senders take turns frame by frame."""
        await trio.lowlevel.checkpoint()
        view = memoryview(data)
        while view:
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                await self._wait(trio.lowlevel.wait_writable)
            except OSError as error:
                raise Unavailable("connection was closed by the peer") from error

    async def receive_into(self, target: memoryview) -> int:
        """See RawStream."""
        while True:
            try:
                count = self._socket.recv_into(target)
            except BlockingIOError:
                await self._wait(trio.lowlevel.wait_readable)
                continue
            except OSError as error:
                raise Unavailable("connection was closed by the peer") from error
            self._receives += 1
            if self._receives % RECEIVES_PER_TURN == 0:
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.checkpoint_if_cancelled()
            return count

    async def _wait(self, ready: Callable[[socket.socket], Awaitable[None]]) -> None:
        try:
            await ready(self._socket)
        except (OSError, ValueError, trio.ClosedResourceError) as error:
            raise Unavailable("connection was closed") from error

    def has_input(self) -> bool:
        """See RawStream."""
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def abort(self) -> None:
        """See RawStream."""
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()


class SocketListener:
    """A listening TCP socket."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = sock

    @property
    def port(self) -> int:
        """See Listener."""
        port: int = self._socket.getsockname()[1]
        return port

    async def accept(self) -> RawStream:
        """See Listener; waits out a shortage of descriptors instead of ending the server."""
        while True:
            try:
                sock, _ = await self._socket.accept()
            except trio.ClosedResourceError as error:
                raise Unavailable("listener is closed") from error
            except OSError:
                await trio.sleep(0.1)
                continue
            return SocketStream(sock)

    def close(self) -> None:
        """See Listener."""
        self._socket.close()


class SystemRuntime:
    """The real world."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(_OFFLOAD_THREADS_MAX)

    def now_ns(self) -> int:
        """See Runtime. By the clock that the kernel takes file times from (a few milliseconds).

        A finer one would be ahead of it: a file could be older after `touch` than before.
        """
        return time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)

    def random_bytes(self, count: int) -> bytes:
        """See Runtime."""
        return os.urandom(count)

    async def offload(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """See Runtime."""
        return await trio.to_thread.run_sync(function, *args, limiter=self._limiter)

    async def connect(self, host: str, port: int) -> RawStream:
        """See Runtime."""
        sock = trio.socket.socket(
            trio.socket.AF_INET6 if ":" in host else trio.socket.AF_INET, trio.socket.SOCK_STREAM
        )
        try:
            with trio.fail_after(CONNECT_DEADLINE_S):
                await sock.connect((host, port))
        except trio.TooSlowError as error:
            sock.close()
            raise DeadlineExceeded(f"no answer from {host}:{port}") from error
        except OSError as error:
            sock.close()
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise Unavailable(f"cannot connect to {host}:{port}: {reason}") from error
        except BaseException:
            sock.close()
            raise
        return SocketStream(sock)

    async def listen(self, host: str, port: int) -> Listener:
        """See Runtime."""
        sock = trio.socket.socket(
            trio.socket.AF_INET6 if ":" in host else trio.socket.AF_INET, trio.socket.SOCK_STREAM
        )
        sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_REUSEADDR, 1)
        try:
            await sock.bind((host, port))
            sock.listen(1024)
        except OSError as error:
            sock.close()
            raise Unavailable(f"cannot listen on {host}:{port}: {error.strerror}") from error
        return SocketListener(sock)


class ProgressDeadline:
    """Bounds the time between the steps of a transfer: one cancel scope that each step moves on.

    Raises DeadlineExceeded naming `what` when no step came for about `seconds` (a tenth less at
    worst: the scope is not moved more often than that).
    """

    def __init__(self, seconds: float, what: str) -> None:
        self._seconds = seconds
        self._what = what
        self._scope = trio.CancelScope()

    def step(self) -> None:
        """Note progress."""
        now = trio.current_time()
        if self._scope.deadline - now < 0.9 * self._seconds:
            self._scope.deadline = now + self._seconds

    def __enter__(self) -> "ProgressDeadline":
        self._scope.deadline = trio.current_time() + self._seconds
        self._scope.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        caught = bool(self._scope.__exit__(kind, error, trace))
        if self._scope.cancelled_caught:
            raise DeadlineExceeded(f"{self._what} took longer than {self._seconds:g} s")
        return caught


async def with_deadline(seconds: float, what: str, wait: Callable[[], Awaitable[T]]) -> T:
    """Await `wait()`; raises DeadlineExceeded naming `what` when it takes too long."""
    with trio.move_on_after(seconds) as scope:
        return await wait()
    assert scope.cancelled_caught
    raise DeadlineExceeded(f"{what} took longer than {seconds:g} s")

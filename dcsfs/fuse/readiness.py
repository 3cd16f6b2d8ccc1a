"""How pyfuse3's workers wait for the kernel's next request.

pyfuse3's own wait takes a lock and an epoll round for every request: two passes of the whole
scheduler, 20 to 50 ms each while a hundred transfers run. Here a worker that has answered looks
whether the next request is there and takes it at once, for a few milliseconds a burst.
"""

import logging
import os
import select

import pyfuse3
import trio

from dcsfs.fuse.handshake import Handshake

log = logging.getLogger(__name__)

BURST_S = 0.005
"""After this long of one request on the other, the network has its turn."""
IDLE_WAIT_S = 100e-6
"""With nothing else to run, the next request is waited for on the spot: epoll costs more."""
_SELECT_MAX = 1024


class RequestWaiter:
    """Stands in for `pyfuse3._wait_fuse_readable`; one a process, as pyfuse3's session is."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)
        self._parked = trio.lowlevel.ParkingLot()
        self._is_watched = False
        self._is_closed = False
        self._burst_end = 0.0
        handshake = Handshake(descriptor)
        self._handshake = handshake if handshake.begin() else None

    async def wait(self) -> bool:
        """True once a request can be read without blocking; False when the session is over.

        No checkpoint when one is there already and the burst is not over.
        """
        if self._handshake is not None and self._handshake.end():
            self._handshake = None
        if trio.current_time() < self._burst_end and (self._poll.poll(0) or self._comes_soon()):
            return True
        while self._is_watched and not self._is_closed:
            await self._parked.park()
        if self._is_closed:
            return False
        self._is_watched = True
        try:
            while True:
                await trio.lowlevel.wait_readable(self._descriptor)
                if self._poll.poll(0):  # not taken by a worker in its burst
                    self._burst_end = trio.current_time() + BURST_S
                    return True
        except trio.ClosedResourceError:
            self.close()
            return False
        finally:
            self._is_watched = False
            self._parked.unpark()

    def _comes_soon(self) -> bool:
        """Wait for a moment, if nobody else in this process wants to run."""
        if self._descriptor >= _SELECT_MAX:
            return False
        if trio.lowlevel.current_statistics().tasks_runnable:
            return False
        return bool(select.select([self._descriptor], [], [], IDLE_WAIT_S)[0])

    def close(self) -> None:
        """End all waits, before `pyfuse3.terminate`."""
        self._is_closed = True
        self._burst_end = 0.0
        self._parked.unpark_all()
        if self._handshake is not None:
            self._handshake.close()


def install() -> RequestWaiter | None:
    """Put a waiter in place, after `pyfuse3.init`; None if this pyfuse3 has no such hook.

    Cython looks its module's functions up by name at each call; the name is private to 3.5, so a
    version without it keeps its own wait, which is slower and otherwise the same.
    """
    descriptor = fuse_descriptor()
    if descriptor is None or not hasattr(pyfuse3, "_wait_fuse_readable"):
        log.warning("requests are waited for by pyfuse3 itself: expect half the speed")
        return None
    waiter = RequestWaiter(descriptor)
    vars(pyfuse3)["_wait_fuse_readable"] = waiter.wait
    return waiter


def fuse_descriptor() -> int | None:
    """This process's /dev/fuse, once `pyfuse3.init` has opened it."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                return int(name)
        except OSError:
            continue
    return None

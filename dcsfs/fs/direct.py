"""Operations the satellite decides at once: what a shared mount does to names and attributes.

Concurrent callers share a request, in which each operation stands alone. Requests have a sequence
of their own: one whose answer was lost is sent again before the next, so nothing is done twice.
"""

import errno
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from dcsfs.fs import building
from dcsfs.fs.errors import FsError, as_fs_error
from dcsfs.fs.lease import LeaseChanged
from dcsfs.fs.state import Inode
from dcsfs.fs.volume import Volume
from network import messages as m
from network.errors import (
    DcsError,
    PreconditionFailed,
    SessionLost,
    Unavailable,
    error_from_wire,
)
from network.ids import Hash

log = logging.getLogger(__name__)
T = TypeVar("T")

UNITS_PER_REQUEST_MAX = 256
DIRECT_DEADLINE_S = 20.0
OFFLINE_DEADLINE_S = 3.0
RETRY_S = 0.2
_NO_CHAIN = Hash(bytes(32))
TRIES_MAX = 16
"""Preconditions that fail in a row; each means that another session was faster."""


async def retried(change: Callable[[], Awaitable[T]]) -> T:
    """Try a change anew while preconditions fail; EAGAIN in the end."""
    for _ in range(TRIES_MAX):
        try:
            return await change()
        except PreconditionFailed:
            continue
    raise FsError(errno.EAGAIN, "other mounts keep changing the same thing")


@dataclass(slots=True)
class _Unit:
    """Operations of one caller; the first one decides."""

    operations: tuple[m.Operation, ...]
    done: trio.Event = field(default_factory=trio.Event)
    error: Exception | None = None

    def end(self, error: Exception | None) -> None:
        self.error = error
        self.done.set()


class DirectCalls:
    """Sends one volume's direct operations; `run` is the background task."""

    def __init__(self, volume: Volume, next_progress: Callable[[], Awaitable[None]]) -> None:
        self._volume = volume
        self._next_progress = next_progress
        self._waiting: list[_Unit] = []
        self._wake = trio.Event()
        self._unsettled: m.ApplyRequest | None = None
        self.lock = trio.Lock()
        """Held while a request is on its way, and by who changes the lease."""

    async def decide(self, *operations: m.Operation) -> None:
        """Have operations done at the satellite; raises the error of the first one.

        Raises FsError for what POSIX has an errno for, PreconditionFailed if what the change was
        built on is old, LeaseChanged if the lease has come back, Unavailable within the deadline.
        If cancelled, or Unavailable, they may happen all the same.
        """
        if not self._volume.is_shared:
            raise LeaseChanged
        unit = _Unit(operations)
        self._waiting.append(unit)
        self._wake.set()
        await unit.done.wait()
        if unit.error is not None:
            raise as_fs_error(unit.error)

    async def run(self) -> None:
        """Send what waits until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._waiting:
                async with self.lock:
                    units = self._waiting[:UNITS_PER_REQUEST_MAX]
                    del self._waiting[:UNITS_PER_REQUEST_MAX]
                    await self._send_units(units)

    async def _send_units(self, units: list[_Unit]) -> None:
        volume = self._volume
        if not volume.is_shared:
            for unit in units:
                unit.end(LeaseChanged())
            return
        session = volume.session
        operations = tuple(operation for unit in units for operation in unit.operations)
        try:
            with trio.fail_after(OFFLINE_DEADLINE_S if volume.is_offline else DIRECT_DEADLINE_S):
                await self._settle()
                while volume.has_backlog:  # what was done before under the lease comes first
                    with trio.move_on_after(RETRY_S):
                        await self._next_progress()
                self._unsettled = m.ApplyRequest(
                    volume.client.api_key, session.session_id, session.direct_sequence + 1,
                    _NO_CHAIN, False, True, operations,
                )  # fmt: skip
                response = await self._settle()
        except (DcsError, trio.TooSlowError) as error:
            failure = (
                error
                if isinstance(error, DcsError)
                else Unavailable(
                    "the satellite did not answer in time; whether the change was made is not known"
                )
            )
            for unit in units:
                unit.end(failure)
            return
        assert response is not None
        results = iter(response.results)
        for unit in units:
            codes = [next(results) for _ in unit.operations]
            unit.end(error_from_wire(codes[0].code, codes[0].text) if codes[0].code else None)

    async def _settle(self) -> m.ApplyResponse | None:
        """Send the request whose outcome is not known yet; raises what the satellite raises."""
        while self._unsettled is not None:
            try:
                response = await self._volume.client.call(m.APPLY, self._unsettled)
            except Unavailable:
                await trio.sleep(RETRY_S)
                continue
            except SessionLost:  # it goes on under the same id and sequence once it is opened again
                self._volume.on_session_lost()
                await trio.sleep(RETRY_S)
                continue
            except DcsError:
                self._unsettled = None  # refused as a whole: it has no number
                raise
            self._volume.session.direct_sequence = self._unsettled.sequence
            self._volume.client.counters.satellite_transactions += 1
            self._unsettled = None
            return response
        return None


class Watch:
    """Whether anything else came to be known between a decision's beginning and its end."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._before = (volume.events_seen, volume.loads)

    def end(self) -> bool:
        """True if nothing did. Answers asked for before this call count as old from here on."""
        volume = self._volume
        is_quiet = self._before == (volume.events_seen, volume.loads)
        volume.events_seen += 1
        return is_quiet


async def decide_attributes(
    volume: Volume,
    direct: DirectCalls,
    inode: Inode,
    operation: m.SetAttributes,
    operations: list[m.Operation],
) -> None:
    """Have attributes decided, and take them over unless others were at it too.

    Raises PreconditionFailed when what is known of the inode is old: it is loaded anew then.
    """
    watch = Watch(volume)
    try:
        await direct.decide(*operations)
    except BaseException:
        inode.is_stale = True
        raise
    building.adopt_attributes(inode, operation)
    if not watch.end():
        inode.is_stale = True

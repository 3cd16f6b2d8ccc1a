"""The lease of a mount and its channel to the satellite: who may answer, and what to forget.

Alone, a mount holds the bucket's write lease. When another session comes it is recalled: names
and attributes changed so far are committed, and from then on the satellite decides. What others
change arrives as events and is forgotten, here and in the kernel, before it is acknowledged; the
writer waits for that. Alone again, the mount asks for the lease.
"""

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from typing import Protocol

import trio

from dcsfs.fs.direct import DirectCalls
from dcsfs.fs.volume import SessionState, Volume
from dcsfs.fs.writeback import Writeback
from network.codec import pack, unpack
from network.coherence import (
    ACQUIRE_LEASE,
    SUBSCRIBE,
    Acknowledge,
    AcquireLeaseRequest,
    Event,
    Held,
    Orphans,
    Ping,
    Pong,
    Recall,
    Released,
    Reservation,
    SubscribeRequest,
    ToClient,
    ToServer,
    Welcome,
)
from network.errors import DcsError, SessionLost
from network.limits import PING_INTERVAL_S, RECALL_DEADLINE_S, TRUST_S
from network.rpc import DATA, check_reply
from network.runtime import with_deadline
from network.transport import SecureStream

log = logging.getLogger(__name__)

CALM_PING_INTERVAL_S = 3 * PING_INTERVAL_S
"""While the lease is held nothing is trusted for a pong's sake."""
SILENCE_S = 3 * TRUST_S
RECONNECT_S = 0.5
AT_ONCE_S = 0.02
RESERVATIONS_MAX = 65536
KERNEL_DEADLINE_S = 1.0
"""A page that is being read is waited for so long: its reader began before the change."""
KERNEL_ALL_DEADLINE_S = RECALL_DEADLINE_S - 3.0


class KernelCaches(Protocol):
    """What the kernel remembers of a mount."""

    async def drop(self, numbers: Sequence[int]) -> None:
        """Forget attributes and pages of inodes."""

    async def drop_all(self, *, then: Callable[[], None]) -> None:
        """Forget every name, attribute and page.

        `then` is called before the first checkpoint, once it is listed what there is to forget:
        what the kernel knows is known from the volume's memory.
        """


class NoKernel:
    """A volume that is not mounted."""

    async def drop(self, numbers: Sequence[int]) -> None:
        """See KernelCaches."""

    async def drop_all(self, *, then: Callable[[], None]) -> None:
        """See KernelCaches."""
        then()


class Coherence:
    """One volume's channel; `run` is its background task."""

    def __init__(
        self,
        volume: Volume,
        writeback: Writeback,
        direct: DirectCalls,
        open_session: Callable[[], Awaitable[SessionState]],
    ) -> None:
        self._volume = volume
        self._writeback = writeback
        self._direct = direct
        self._open_session = open_session
        self.kernel: KernelCaches = NoKernel()
        self._stream: SecureStream | None = None
        self._send_lock = trio.Lock()
        self._pinged_at: dict[int, float] = {}
        self._ping_now = trio.Event()
        self._is_vouched = False
        """Nothing in memory is older than the channel."""
        self._is_yielding = False
        self._scope = trio.CancelScope()
        volume.on_session_lost = self._begin_anew

    def _begin_anew(self) -> None:
        """End the channel: the next one finds the session lost, and opens it again."""
        if self._stream is not None:
            self._stream.abort()

    def close(self) -> None:
        """End the channel for good: the session is about to be closed."""
        self._scope.cancel()

    async def run(self) -> None:
        """Keep the channel open until cancelled or closed."""
        with self._scope:
            await self._keep_open()

    async def _keep_open(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    await self._run_channel(nursery)
                except SessionLost as error:
                    log.warning("%s", error)
                    await self._open_again()
                except Exception as error:
                    if not isinstance(error, DcsError | OSError):
                        log.exception("the channel failed")
                    log.info("the channel to the satellite is down: %s", error)
                    # One that was open is tried again first: others may be at work over there.
                    self._volume.is_offline = self._stream is None
                self._stream, self._is_vouched = None, False
                await trio.sleep(RECONNECT_S if self._volume.is_offline else AT_ONCE_S)

    async def _open_again(self) -> None:
        try:
            fresh = await self._open_session()
        except (DcsError, OSError) as error:
            log.warning("the session cannot be opened again: %s", error)
            self._volume.is_offline = True
            return
        self._volume.session.session_id = fresh.session_id
        self._volume.is_shared = not fresh.holds_lease
        if self._volume.is_shared:
            self._volume.mark_overtaken()

    async def _run_channel(self, background: trio.Nursery) -> None:
        """One connection, until it fails; raises what ended it."""
        client, session = self._volume.client, self._volume.session
        failure: Exception | None = None
        async with client.open_stream() as stream:
            request = SubscribeRequest(client.api_key, session.session_id)
            await stream.send(SUBSCRIBE.code, pack(request))
            self._pinged_at.clear()
            events, unread = trio.open_memory_channel[Event | Orphans](4096)
            async with trio.open_nursery() as nursery:
                try:
                    nursery.start_soon(self._ping_forever, stream)
                    nursery.start_soon(self._answer_forever, stream, unread)
                    await self._receive_forever(stream, events, background)
                except Exception as error:  # noqa: BLE001 -- raised again outside the nursery
                    failure = error
                    stream.abort()
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _send(
        self, stream: SecureStream, frame: Ping | Acknowledge | Released | Held
    ) -> None:
        """Send a frame; a connection that takes none is given up."""
        try:
            async with self._send_lock:
                data = pack(ToServer(frame))
                await with_deadline(SILENCE_S, "a frame", lambda: stream.send(DATA, data))
        except DcsError as error:
            log.info("the channel takes nothing: %s", error)
            stream.abort()

    async def _ping_forever(self, stream: SecureStream) -> None:
        number = 0
        while True:
            number += 1
            self._pinged_at[number] = trio.current_time()
            await self._send(stream, Ping(number))
            self._ping_now = trio.Event()
            calm = not self._volume.is_shared
            with trio.move_on_after(CALM_PING_INTERVAL_S if calm else PING_INTERVAL_S):
                await self._ping_now.wait()

    async def _receive_forever(
        self,
        stream: SecureStream,
        events: trio.MemorySendChannel[Event | Orphans],
        background: trio.Nursery,
    ) -> None:
        while True:
            reply = await with_deadline(SILENCE_S, "the next pong", stream.receive)
            match unpack(ToClient, check_reply(reply).header).frame:
                case Welcome(holds_lease):
                    self._stream = stream
                    self._welcomed(background, holds_lease=holds_lease)
                case Pong(number, is_alone):
                    sent_at = self._pinged_at.pop(number, 0.0)
                    if self._is_vouched:
                        self._volume.trusted_until = sent_at + TRUST_S
                    if is_alone and self._volume.is_shared and self._is_vouched:
                        background.start_soon(_guarded, self._acquire)
                case Event() | Orphans() as event:
                    events.send_nowait(event)
                case Recall():
                    background.start_soon(_guarded, self._yield_lease)

    async def _answer_forever(
        self, stream: SecureStream, events: trio.MemoryReceiveChannel[Event | Orphans]
    ) -> None:
        """In their order: an inode is not asked for before its last name has been forgotten."""
        async for event in events:
            if isinstance(event, Orphans):
                held = tuple(filter(self._volume.is_held, event.inodes))
                await self._send(stream, Held(event.number, held))
                continue
            if self._volume.is_shared:
                numbers = self._volume.take_in(event.changes)
                with trio.move_on_after(KERNEL_DEADLINE_S):
                    await self.kernel.drop(numbers)
            await self._send(stream, Acknowledge(event.number))

    def _welcomed(self, background: trio.Nursery, *, holds_lease: bool) -> None:
        volume = self._volume
        volume.is_offline = False
        if volume.is_shared:
            background.start_soon(_guarded, self._start_over)
        elif not holds_lease:
            log.warning(
                "the write lease went to another session meanwhile; what contradicts its "
                "changes is kept beside them as conflict copies"
            )
            volume.is_shared = True
            volume.mark_overtaken()
            self._writeback.demand()
            background.start_soon(_guarded, self._start_over)

    async def _start_over(self) -> None:
        """Once what was done under a lease is committed, forget all; then events keep it true."""
        stream = self._stream
        while self._volume.has_backlog:
            self._writeback.demand()
            with trio.move_on_after(RECONNECT_S):
                await self._writeback.next_progress()
        if stream is not self._stream or not self._volume.is_shared:
            return
        with trio.move_on_after(KERNEL_ALL_DEADLINE_S):
            await self.kernel.drop_all(then=self._volume.forget_everything)
        self._is_vouched = True
        self._ping_now.set()

    async def _yield_lease(self) -> None:
        """Commit what was answered here; then the satellite may answer others."""
        if self._is_yielding:
            return
        self._is_yielding = True
        try:
            volume = self._volume
            async with self._direct.lock:  # an answer that gives the lease may be on its way
                was_held, volume.is_shared = not volume.is_shared, True
            began = trio.current_time()
            if was_held:
                self._ping_now.set()
                is_flushed = await self._writeback.flush_names()
                if not is_flushed or trio.current_time() > began + RECALL_DEADLINE_S:
                    volume.mark_overtaken()
                    await self._start_over()
                    return
                with trio.move_on_after(KERNEL_ALL_DEADLINE_S):
                    await self.kernel.drop_all(then=lambda: None)  # what is known here is right
                self._is_vouched = True
                self._ping_now.set()
            if not volume.has_backlog and self._stream is not None:
                await self._send(self._stream, Released(self._reserved()))
                log.info("another session has come: the satellite decides from now on")
        finally:
            self._is_yielding = False

    def _reserved(self) -> tuple[Reservation, ...]:
        """Files with staged content: what is older than the others' comes before theirs."""
        volume = self._volume
        volume.freeze()  # what is written from now on is newer
        self._writeback.demand()
        counts = Counter(number for batch in volume.queue for number in batch.layers)
        return tuple(Reservation(*item) for item in counts.most_common(RESERVATIONS_MAX))

    async def _acquire(self) -> None:
        """Ask for the lease; what is in memory is loaded again then."""
        volume = self._volume
        if self._direct.lock.locked():
            return  # the next pong asks again
        async with self._direct.lock:
            if not volume.is_shared or volume.has_backlog:
                return
            needed = (
                inode.number
                for inode in volume.inodes.values()
                if volume.is_held(inode.number) or (inode.nlink == 0 and inode.is_in_use)
            )
            orphans = tuple(islice(needed, 65536))
            request = AcquireLeaseRequest(volume.client.api_key, volume.session.session_id, orphans)
            try:
                reply = await volume.client.call(ACQUIRE_LEASE, request)
            except DcsError as error:
                log.info("the lease was not given: %s", error)
                return
            if reply.holds_lease:
                volume.forget_everything()
                volume.is_shared = False
                log.info("alone on the bucket: the lease is held here")


async def _guarded(task: Callable[[], Awaitable[None]]) -> None:
    """A failure here must not end the mount: the channel's next turn tries again."""
    try:
        await task()
    except Exception:
        log.exception("keeping the lease in order failed")

"""The sessions' channels: changes pushed to all others, leases recalled, trust accounted for.

A writer is answered once every other session has acknowledged its change or can trust nothing it
has cached: TRUST_S after the last ping that the satellite has seen, or could have seen before it
was started.
"""

import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import trio

from network.codec import pack, unpack
from network.coherence import (
    Acknowledge,
    Change,
    Event,
    Held,
    Orphans,
    Ping,
    Pong,
    Recall,
    Released,
    Reservation,
    ToClient,
    ToServer,
    Welcome,
)
from network.errors import DcsError, Unavailable
from network.ids import SessionID
from network.limits import (
    ACKNOWLEDGE_DEADLINE_S,
    CHANNEL_QUEUE_FRAMES_MAX,
    RECALL_DEADLINE_S,
    TRUST_S,
)
from network.rpc import DATA
from network.runtime import with_deadline
from network.transport import SecureStream

log = logging.getLogger(__name__)

SILENCE_S = 3 * TRUST_S
"""A channel without a ping for so long is closed."""


class _Channel:
    """One session's channel; `trusted_until` outlives its connection."""

    def __init__(self, trusted_until: float) -> None:
        self.trusted_until = trusted_until
        self.is_open = False
        self.acknowledged = 0
        self.held = Held(0, ())
        self.outgoing: deque[ToClient] = deque()
        self.changed = trio.Event()
        self.scope = trio.CancelScope()

    def announce(self) -> None:
        """Wake whoever waits for this channel."""
        self.changed.set()
        self.changed = trio.Event()

    def send(self, frame: Welcome | Pong | Event | Recall | Orphans) -> None:
        """Queue a frame; a client that takes none is cut off."""
        if len(self.outgoing) >= CHANNEL_QUEUE_FRAMES_MAX:
            self.cut()
            return
        self.outgoing.append(ToClient(frame))
        self.announce()

    def cut(self) -> None:
        """End the connection: no ping is taken from it any more."""
        self.is_open = False
        self.outgoing.clear()
        self.scope.cancel()
        self.announce()


class Hub:
    """All channels of a satellite."""

    def __init__(self) -> None:
        self._channels: dict[SessionID, _Channel] = {}
        self._started_at = trio.current_time()
        self._number = 0
        self._opening: Counter[int] = Counter()

    @contextmanager
    def opening(self, bucket_id: int) -> Iterator[None]:
        """While a session is being opened no lease is given on its bucket."""
        self._opening[bucket_id] += 1
        try:
            yield
        finally:
            self._opening[bucket_id] -= 1
            if not self._opening[bucket_id]:
                del self._opening[bucket_id]

    def is_opening(self, bucket_id: int) -> bool:
        """Whether a session of the bucket is being opened."""
        return bucket_id in self._opening

    def _channel(self, session_id: SessionID) -> _Channel:
        found = self._channels.get(session_id)
        if found is None:
            # Before this satellite started, another one may have answered its pings.
            found = self._channels[session_id] = _Channel(self._started_at + TRUST_S)
        return found

    def forget(self, session_id: SessionID) -> None:
        """A session was closed."""
        channel = self._channels.pop(session_id, None)
        if channel is not None:
            channel.cut()

    async def publish(self, sessions: Sequence[SessionID], changes: tuple[Change, ...]) -> None:
        """Tell sessions of committed changes; returns when none can show the old state.

        Bounded by ACKNOWLEDGE_DEADLINE_S and TRUST_S.
        """
        if not changes or not sessions:
            return
        self._number += 1
        number = self._number
        # A channel that is opened from now on is another one: its client has forgotten less.
        channels = [self._channel(session_id) for session_id in sessions]
        for channel in channels:
            if channel.is_open:
                channel.send(Event(number, changes))
        for channel in channels:
            await self._wait_acknowledged(channel, number)

    async def _wait_acknowledged(self, channel: _Channel, number: int) -> None:
        with trio.move_on_after(ACKNOWLEDGE_DEADLINE_S):
            while channel.is_open and channel.acknowledged < number:
                await channel.changed.wait()
        if channel.acknowledged >= number:
            return
        if channel.is_open:
            log.warning("a session does not take in changes: its channel is closed")
            channel.cut()
        await trio.sleep_until(channel.trusted_until)

    async def held_by(
        self, sessions: Sequence[SessionID], inodes: Sequence[int]
    ) -> frozenset[int] | None:
        """Which of these orphans any session holds; None if one does not say so in time.

        Bounded by ACKNOWLEDGE_DEADLINE_S.
        """
        channels = [self._channel(session_id) for session_id in sessions]
        self._number += 1
        number = self._number
        for channel in channels:
            if channel.is_open:
                channel.send(Orphans(number, tuple(inodes)))
        with trio.move_on_after(ACKNOWLEDGE_DEADLINE_S):
            for channel in channels:
                while channel.is_open and channel.held.number != number:
                    await channel.changed.wait()
        if any(channel.held.number != number for channel in channels):
            return None
        return frozenset(inode for channel in channels for inode in channel.held.inodes)

    async def recall(self, session_id: SessionID, is_released: Callable[[], bool]) -> None:
        """Ask a session for its lease; returns when it is given back or the deadline is over."""
        with trio.move_on_after(RECALL_DEADLINE_S):
            asked: _Channel | None = None
            while not is_released():
                channel = self._channel(session_id)
                if channel.is_open and channel is not asked:
                    channel.send(Recall())
                    asked = channel
                with trio.move_on_after(0.5):  # it may come back on another connection
                    await channel.changed.wait()

    async def serve(
        self,
        session_id: SessionID,
        stream: SecureStream,
        *,
        holds_lease: bool,
        is_alone: Callable[[], bool],
        on_released: Callable[[Sequence[Reservation]], Awaitable[None]],
    ) -> None:
        """Run a channel until its connection ends; raises Unavailable then."""
        previous = self._channel(session_id)
        previous.cut()
        channel = self._channels[session_id] = _Channel(previous.trusted_until)
        channel.is_open = True
        channel.acknowledged = self._number
        channel.send(Welcome(holds_lease))

        async def run(part: Callable[[], Awaitable[None]]) -> None:
            try:
                await part()
            except DcsError as error:
                log.debug("a channel ended: %s", error)
                channel.cut()

        try:
            with channel.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(run, partial(_send_forever, channel, stream))
                    await run(partial(_receive_forever, channel, stream, is_alone, on_released))
        finally:
            channel.cut()
        raise Unavailable("the channel was closed")


async def _receive_forever(
    channel: _Channel,
    stream: SecureStream,
    is_alone: Callable[[], bool],
    on_released: Callable[[Sequence[Reservation]], Awaitable[None]],
) -> None:
    while True:
        frame = await with_deadline(SILENCE_S, "the next ping", stream.receive)
        match unpack(ToServer, frame.header).frame:
            case Ping(number):
                channel.trusted_until = trio.current_time() + TRUST_S
                channel.send(Pong(number, is_alone()))
            case Acknowledge(number):
                channel.acknowledged = max(channel.acknowledged, number)
                channel.announce()
            case Held() as held:
                channel.held = held
                channel.announce()
            case Released(reserved):
                await on_released(reserved)
                channel.announce()


async def _send_forever(channel: _Channel, stream: SecureStream) -> None:
    while True:
        while channel.outgoing:
            data = pack(channel.outgoing.popleft())
            await with_deadline(SILENCE_S, "sending to a session", partial(stream.send, DATA, data))
        await channel.changed.wait()

"""Read ranges of a segment from its nodes (docs/specs/segment.md, "Reading").

The code is systematic: a range whose data shares can be had is a copy. When a share is missing,
late or wrong, other indices of its stripes are asked until any k shares of each stripe are there.
Every share is checked on its own against the segment root before it is used; a node that serves a
wrong one is reported by name.
"""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from network import piecehash
from network.codec import pack, unpack
from network.errors import (
    DcsError,
    IntegrityError,
    LimitExceeded,
    ProtocolError,
    TooFewShares,
)
from network.limits import (
    ORDER_STEP_BYTES,
    PIECE_PROGRESS_DEADLINE_S,
)
from network.messages import PieceGrant, SegmentGrant
from network.orders import Order, sign_order
from network.piecemessages import GET_PIECE, GetPieceRequest, PieceInfo
from network.redundancy import RedundancyScheme, SegmentLayout
from network.rpc import ConnectionPool, check_reply
from network.runtime import ProgressDeadline
from network.segment import decode_stripe
from network.transport import SecureStream

log = logging.getLogger(__name__)

HEDGE_FLOOR_S = 0.5
SLOW_FACTOR = 2.0
"""A node that sent nothing for half a second gets a competitor; also one that takes twice as long
as the fastest of the same read."""
DIAL_FLOOR_S = 1.5
"""A new connection takes three round trips before the request goes out."""

BadNode = Callable[[PieceGrant, str], None]


@dataclass(slots=True)
class _Source:
    """One index's node: its credit, its verified hashes, and how it has behaved."""

    grant: PieceGrant
    order: Order | None = None
    used: int = 0
    share_hashes: bytes | None = None
    failures: int = 0


class SegmentHandle:
    """An open segment: GET credit at its nodes, to be used for many reads until it expires."""

    def __init__(self, grant: SegmentGrant) -> None:
        scheme = grant.scheme
        self.scheme = RedundancyScheme(scheme.required, scheme.repair, scheme.success, scheme.total)
        self.segment_id = grant.segment_id
        self.root = grant.root
        self.layout = SegmentLayout(scheme.required, grant.size)
        self._key = Ed25519PrivateKey.from_private_bytes(grant.order_key)
        self.sources = {item.index: _Source(item) for item in grant.grants}
        self.expires_s = min((item.limit.expires_s for item in grant.grants), default=0)

    def usable(self, now: int) -> bool:
        """Whether the limits live on for a while and no node's credit is nearly spent."""
        if self.expires_s - now < 60:
            return False
        return all(
            source.used + 2 * self.layout.piece_bytes <= source.grant.limit.byte_limit
            for source in self.sources.values()
        )

    def order_for(self, source: _Source, amount: int) -> Order:
        """An order that covers `amount` more bytes, signed in steps; raises LimitExceeded."""
        limit = source.grant.limit
        total = source.used + amount
        if total > limit.byte_limit:
            raise LimitExceeded("credit at this node is used up")
        if source.order is None or source.order.amount < total:
            step = min(limit.byte_limit, max(total, source.used + ORDER_STEP_BYTES))
            source.order = sign_order(self._key, limit.serial, step)
        source.used = total
        return source.order


@dataclass(slots=True)
class _Task:
    """One request to one node: shares [first, first + count) of piece `index`."""

    index: int
    first: int
    count: int
    started: float
    moved_at: float
    """When bytes last came."""
    stream: SecureStream | None = None
    seen_bytes: int = 0
    is_late: bool = False


@dataclass(slots=True)
class _Stripe:
    wanted: list[int]
    """Data indices that the caller wants, in order."""
    missing: set[int]
    """Those that have not come yet."""
    have: dict[int, memoryview] = field(default_factory=dict)

    def is_ready(self, required: int) -> bool:
        return not self.missing or len(self.have) >= required


@dataclass(slots=True)
class _Read:
    stripes: dict[int, _Stripe]
    """Not delivered yet, in order."""
    running: dict[int, _Task] = field(default_factory=dict)
    tried: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    fastest_s: float | None = None
    news: trio.Event = field(default_factory=trio.Event)


Deliver = Callable[[list[memoryview]], Awaitable[None]]
"""Takes consecutive verified parts; may raise DcsError to end the read."""


class SegmentReader:
    """Reads byte ranges of one segment's ciphertext through a handle."""

    def __init__(
        self,
        pool: ConnectionPool,
        handle: SegmentHandle,
        on_bad_node: BadNode = lambda grant, reason: None,
        on_bytes: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._pool = pool
        self._handle = handle
        self._required = handle.scheme.required
        self._on_bad_node = on_bad_node
        self._on_bytes = on_bytes

    async def read(self, start: int, end: int) -> list[memoryview]:
        """Bytes [start, end) of the segment as consecutive views, verified; see `stream`."""
        found: list[memoryview] = []

        async def collect(parts: list[memoryview]) -> None:
            found.extend(parts)

        await self.stream(start, end, collect)
        return found

    async def stream(self, start: int, end: int, deliver: Deliver) -> None:
        """Hand bytes [start, end) of the segment to `deliver`, stripe after stripe, verified.

        Raises TooFewShares when some stripe has fewer than k intact reachable shares, and what
        `deliver` raises. The caller sets the overall deadline; if cancelled, connections in use
        are dropped.
        """
        read = _Read({})
        direct: dict[int, list[int]] = {}
        for stripe, index in self._handle.layout.shares_of(start, end):
            direct.setdefault(index, []).append(stripe)
            entry = read.stripes.setdefault(stripe, _Stripe([], set()))
            entry.wanted.append(index)
            entry.missing.add(index)
        failure: DcsError | None = None
        async with trio.open_nursery() as nursery:

            def begin(index: int, first: int, count: int) -> None:
                now = trio.current_time()
                task = read.running[index] = _Task(index, first, count, now, now)
                read.tried.add(index)
                nursery.start_soon(self._fetch, read, task)

            for index, stripes in direct.items():
                if index in self._handle.sources:
                    begin(index, stripes[0], stripes[-1] - stripes[0] + 1)
                else:
                    read.lost.add(index)
            while read.stripes and failure is None:
                number, entry = next(iter(read.stripes.items()))
                try:
                    if entry.is_ready(self._required):
                        await deliver(await self._parts_of(number, entry, start, end))
                        del read.stripes[number]
                        continue
                    if read.lost:
                        self._start_spares(read, begin)
                except DcsError as error:
                    failure = error
                    break
                read.news = trio.Event()
                with trio.move_on_after(0.05):
                    await read.news.wait()
                self._mark_late(read)
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _parts_of(
        self, number: int, entry: _Stripe, start: int, end: int
    ) -> list[memoryview]:
        """The wanted bytes of a stripe that is ready, decoded if a data share is missing."""
        layout = self._handle.layout
        size, decoded = layout.share_bytes(number), None
        if entry.missing:
            await trio.lowlevel.checkpoint()
            decoded = decode_stripe(self._handle.scheme, layout, number, entry.have)
        parts = []
        for index in entry.wanted:
            share = entry.have.get(index)
            if share is None:
                assert decoded is not None
                share = decoded[index * size : (index + 1) * size]
            base = layout.stripe_range(number)[0] + index * size
            parts.append(share[max(start - base, 0) : min(end - base, size)])
        return parts

    def _mark_late(self, read: _Read) -> None:
        """Have spares stand in for nodes that send nothing, or are much slower than another."""
        now = trio.current_time()
        limit = None
        if read.fastest_s is not None:
            limit = max(HEDGE_FLOOR_S, SLOW_FACTOR * read.fastest_s)
        for task in read.running.values():
            if task.stream is not None and task.stream.received_bytes != task.seen_bytes:
                task.seen_bytes, task.moved_at = task.stream.received_bytes, now
            patience = HEDGE_FLOOR_S if task.stream is not None else DIAL_FLOOR_S
            stalled = now - task.moved_at > patience
            slow = limit is not None and now - task.started > limit
            if not task.is_late and (stalled or slow):
                task.is_late = True
                read.lost.add(task.index)

    def _start_spares(self, read: _Read, begin: Callable[[int, int, int], None]) -> None:
        """Ask further indices until k of every unfinished stripe are there or on their way.

        Raises TooFewShares when nobody is left to ask and nothing is on its way.
        """
        waiting = [n for n, entry in read.stripes.items() if not entry.is_ready(self._required)]
        if not waiting:
            return
        first, count = waiting[0], waiting[-1] - waiting[0] + 1
        coming = {
            index
            for index, task in read.running.items()
            if not task.is_late and task.first <= first and task.first + task.count >= first + count
        }
        present = {
            index
            for index in range(self._handle.scheme.success)
            if all(index in read.stripes[number].have for number in waiting)
        }
        missing = self._required - len(coming | present)
        candidates = [
            index
            for index in self._ranked()
            if index not in present and index not in coming and not self._gave_up(read, index)
        ]
        for index in candidates[: max(0, missing)]:
            begin(index, first, count)
        if missing > 0 and not candidates and not read.running:
            have = min(len(read.stripes[number].have) for number in waiting)
            raise TooFewShares(
                f"segment {self._handle.segment_id}: {have} of {self._required} needed pieces "
                "can be read"
            )

    def _gave_up(self, read: _Read, index: int) -> bool:
        # An index read directly over a shorter range may be asked again for the whole one, once
        # it has answered; one that failed or is on its way is not.
        return index in read.running or (index in read.lost and index in read.tried)

    def _ranked(self) -> list[int]:
        """Indices in order of preference: well-behaved nodes first, then data before parity."""
        sources = self._handle.sources
        return sorted(sources, key=lambda index: (sources[index].failures, index))

    async def _fetch(self, read: _Read, task: _Task) -> None:
        source = self._handle.sources[task.index]
        try:
            await self._fetch_shares(read, task, source)
            elapsed = trio.current_time() - task.started
            read.fastest_s = min(read.fastest_s or elapsed, elapsed)
        except IntegrityError as error:
            log.warning(
                "node served wrong bytes: node=%s segment=%s index=%d: %s",
                source.grant.limit.node_id, self._handle.segment_id, task.index, error,
            )  # fmt: skip
            source.failures += 100
            read.lost.add(task.index)
            self._on_bad_node(source.grant, str(error))
        except DcsError as error:
            log.info("piece read failed: node=%s index=%d: %s",
                     source.grant.limit.node_id, task.index, error)  # fmt: skip
            source.failures += 1
            read.lost.add(task.index)
        finally:
            if read.running.get(task.index) is task:
                del read.running[task.index]
            read.news.set()

    async def _fetch_shares(self, read: _Read, task: _Task, source: _Source) -> None:
        layout = self._handle.layout
        amount = sum(layout.share_bytes(task.first + i) for i in range(task.count))
        order = self._handle.order_for(source, amount)
        request = GetPieceRequest(
            source.grant.limit, source.grant.proof, order, task.first, task.count
        )
        async with self._pool.lease(source.grant.address) as stream:
            task.stream, task.seen_bytes = stream, stream.received_bytes
            task.moved_at = trio.current_time()
            with ProgressDeadline(PIECE_PROGRESS_DEADLINE_S, "receiving shares") as progress:
                await stream.send(GET_PIECE.code, pack(request))
                frame = check_reply(await stream.receive())
                info = unpack(PieceInfo, frame.header)
                hashes = self._verified_hashes(source, task.index, info)
                stripe, end = task.first, task.first + task.count
                while True:
                    progress.step()
                    stripe = self._take_shares(read, task, frame.body, stripe, hashes)
                    if stripe == end:
                        return
                    frame = check_reply(await stream.receive())

    def _take_shares(
        self, read: _Read, task: _Task, body: memoryview, stripe: int, hashes: bytes
    ) -> int:
        """Verify and keep the shares of one frame from `stripe` on; returns the next stripe."""
        position = 0
        while position < len(body):
            if stripe >= task.first + task.count:
                raise ProtocolError("node sent more shares than asked")
            size = self._handle.layout.share_bytes(stripe)
            share = body[position : position + size]
            if len(share) != size:
                raise ProtocolError("node sent a cut share")
            piecehash.verify_share(share, stripe, hashes)
            entry = read.stripes.get(stripe)
            if entry is not None:
                entry.have[task.index] = share
                entry.missing.discard(task.index)
                if entry.is_ready(self._required):
                    read.news.set()
            position += size
            stripe += 1
        if position == 0:
            raise ProtocolError("node sent an empty frame")
        self._on_bytes(position)
        return stripe

    def _verified_hashes(self, source: _Source, index: int, info: PieceInfo) -> bytes:
        """The piece's share hashes, proved to belong to the segment root; IntegrityError if not."""
        if source.share_hashes is not None and info.share_hashes == source.share_hashes:
            return source.share_hashes
        layout = self._handle.layout
        if len(info.share_hashes) != 32 * layout.stripes:
            raise IntegrityError(f"piece {index} has the wrong number of shares")
        total = self._handle.scheme.success
        root = piecehash.piece_root_in(layout, index, total, info.share_hashes)
        piecehash.verify_piece_path(root, index, total, info.path, self._handle.root)
        source.share_hashes = info.share_hashes
        return info.share_hashes

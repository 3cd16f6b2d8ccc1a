"""Read ranges of a segment from its nodes (docs/specs/segment.md, "Reading").

The code is systematic: a range whose data shares can be had is a copy. When a share is missing,
late or wrong, other indices of its stripes are asked until any k shares of each stripe are there.
Every share is checked on its own against the segment root before it is used; a node that serves a
wrong one is reported by name.
"""

import logging
from collections.abc import Callable
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
from network.messages import GET_PIECE, GetPieceRequest, PieceGrant, PieceInfo, SegmentGrant
from network.orders import Order, sign_order
from network.redundancy import RedundancyScheme, SegmentLayout
from network.rpc import ConnectionPool, check_reply
from network.runtime import ProgressDeadline
from network.segment import decode_stripe

log = logging.getLogger(__name__)

HEDGE_FLOOR_S = 0.5
"""A share this late gets a competitor; also twice the fastest answer of the same read."""

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
    index: int
    first: int
    count: int
    started: float
    hedged: bool = False


@dataclass(slots=True)
class _Read:
    needed: set[tuple[int, int]]
    """(stripe, data index) that the caller wants."""
    have: dict[int, dict[int, memoryview]] = field(default_factory=dict)
    running: dict[int, _Task] = field(default_factory=dict)
    tried: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    fastest_s: float | None = None


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
        self._on_bad_node = on_bad_node
        self._on_bytes = on_bytes
        self.verified_bytes = 0

    async def read(self, start: int, end: int) -> list[memoryview]:
        """Bytes [start, end) of the segment as consecutive views, verified.

        Raises TooFewShares when some stripe has fewer than k intact reachable shares. The caller
        sets the overall deadline; if cancelled, connections in use are dropped.
        """
        layout, k = self._handle.layout, self._handle.scheme.required
        wanted = layout.shares_of(start, end)
        read = _Read(set(wanted))
        direct: dict[int, list[int]] = {}
        for stripe, index in wanted:
            direct.setdefault(index, []).append(stripe)
            read.have.setdefault(stripe, {})
        await self._collect(read, direct)
        decoded: dict[int, memoryview] = {}
        for stripe in sorted(read.have):
            shares = read.have[stripe]
            if any((stripe, index) in read.needed and index not in shares for index in range(k)):
                await trio.lowlevel.checkpoint()
                decoded[stripe] = decode_stripe(self._handle.scheme, layout, stripe, shares)
        return self._assemble(wanted, read, decoded, start, end)

    def _assemble(
        self,
        wanted: list[tuple[int, int]],
        read: _Read,
        decoded: dict[int, memoryview],
        start: int,
        end: int,
    ) -> list[memoryview]:
        parts = []
        for stripe, index in wanted:
            size = self._handle.layout.share_bytes(stripe)
            base = self._handle.layout.stripe_range(stripe)[0] + index * size
            share = read.have[stripe].get(index)
            if share is None:
                share = decoded[stripe][index * size : (index + 1) * size]
            low, high = max(start - base, 0), min(end - base, size)
            parts.append(share[low:high])
        return parts

    async def _collect(self, read: _Read, direct: dict[int, list[int]]) -> None:
        wake = trio.Event()
        failure: TooFewShares | None = None
        async with trio.open_nursery() as nursery:

            def begin(index: int, first: int, count: int) -> None:
                read.tried.add(index)
                task = _Task(index, first, count, trio.current_time())
                read.running[index] = task
                nursery.start_soon(self._fetch, read, task, ring)

            def ring() -> None:
                wake.set()

            for index, stripes in direct.items():
                if index in self._handle.sources:
                    begin(index, stripes[0], stripes[-1] - stripes[0] + 1)
                else:
                    read.lost.add(index)
            while not self._complete(read):
                if read.lost:
                    failure = self._start_spares(read, begin)
                    if failure is not None:
                        break
                wake = trio.Event()
                with trio.move_on_after(0.05):
                    await wake.wait()
                self._mark_late(read)
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    def _complete(self, read: _Read) -> bool:
        k = self._handle.scheme.required
        for stripe, index in read.needed:
            shares = read.have[stripe]
            if index not in shares and len(shares) < k:
                return False
        return True

    def _incomplete_stripes(self, read: _Read) -> list[int]:
        k = self._handle.scheme.required
        found = {
            stripe
            for stripe, index in read.needed
            if index not in read.have[stripe] and len(read.have[stripe]) < k
        }
        return sorted(found)

    def _mark_late(self, read: _Read) -> None:
        now = trio.current_time()
        limit = max(HEDGE_FLOOR_S, 2 * (read.fastest_s or 0.0))
        for task in read.running.values():
            if not task.hedged and now - task.started > limit:
                task.hedged = True
                read.lost.add(task.index)

    def _start_spares(
        self, read: _Read, begin: Callable[[int, int, int], None]
    ) -> TooFewShares | None:
        """Ask further indices until k of every unfinished stripe are there or on their way.

        Returns the error when nobody is left to ask and nothing is on its way.
        """
        stripes = self._incomplete_stripes(read)
        if not stripes:
            return None
        first, count = stripes[0], stripes[-1] - stripes[0] + 1
        k = self._handle.scheme.required
        coming = {
            index
            for index, task in read.running.items()
            if not task.hedged and task.first <= first and task.first + task.count >= first + count
        }
        present = {
            index
            for index in range(self._handle.scheme.success)
            if all(index in read.have[stripe] for stripe in range(first, first + count))
        }
        missing = k - len(coming | present)
        candidates = [
            index
            for index in self._ranked()
            if index not in present and index not in coming and not self._gave_up(read, index)
        ]
        for index in candidates[: max(0, missing)]:
            begin(index, first, count)
        if missing > 0 and not candidates and not read.running:
            have = min(len(read.have[stripe]) for stripe in stripes)
            return TooFewShares(
                f"segment {self._handle.segment_id}: {have} of {k} needed pieces can be read"
            )
        return None

    def _gave_up(self, read: _Read, index: int) -> bool:
        # An index read directly over a shorter range may be asked again for the whole one, once
        # it has answered; one that failed or is on its way is not.
        return index in read.running or (index in read.lost and index in read.tried)

    def _ranked(self) -> list[int]:
        """Indices in order of preference: well-behaved nodes first, then data before parity."""
        sources = self._handle.sources
        return sorted(sources, key=lambda index: (sources[index].failures, index))

    async def _fetch(self, read: _Read, task: _Task, ring: Callable[[], None]) -> None:
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
            ring()

    async def _fetch_shares(self, read: _Read, task: _Task, source: _Source) -> None:
        layout = self._handle.layout
        amount = sum(layout.share_bytes(task.first + i) for i in range(task.count))
        order = self._handle.order_for(source, amount)
        request = GetPieceRequest(
            source.grant.limit, source.grant.proof, order, task.first, task.count
        )
        async with self._pool.lease(source.grant.address) as stream:
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
            if stripe in read.have:
                read.have[stripe][task.index] = share
            position += size
            stripe += 1
        if position == 0:
            raise ProtocolError("node sent an empty frame")
        self.verified_bytes += position
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

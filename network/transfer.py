"""Put the pieces of a segment on nodes, with long-tail replacement (docs/specs/segment.md).

Data indices go first and get spares first, so that every segment has its k data pieces and a
read without failures is a copy. An index that fails or is slow is sent at once to a spare node
while the others go on; the first finisher of an index wins.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from network.codec import pack, unpack
from network.errors import DcsError, NotEnoughNodes, Unavailable
from network.ids import Hash, NodeID
from network.limits import (
    DEGRADED_COMMIT_AFTER_S,
    PIECE_PROGRESS_DEADLINE_S,
    PUT_FRAME_SHARES,
)
from network.messages import PieceGrant, StoredPiece
from network.orders import Receipt, sign_order, verify_receipt
from network.piecemessages import PUT_PIECE, FinishPiece, PutPieceRequest
from network.redundancy import RedundancyScheme
from network.rpc import DATA, ConnectionPool, check_reply
from network.runtime import ProgressDeadline, with_deadline
from network.segment import SegmentEncoder
from network.transport import SecureStream

log = logging.getLogger(__name__)

SLOW_FACTOR = 1.5
SLOW_FLOOR_S = 0.3
"""An index is slow when it takes 1.5 x the median of the finished ones, and 0.3 s at least."""
QUORUM_BEFORE_HEDGING = 0.5
SIMULTANEOUS_HEDGES_MAX = 16


@dataclass(frozen=True, slots=True)
class PutResult:
    """What an upload achieved: pieces in index order, and who failed or was too slow."""

    segment_root: Hash
    pieces: tuple[StoredPiece, ...]
    failed_nodes: tuple[tuple[NodeID, str], ...]
    sent_bytes: int


@dataclass(slots=True)
class _Attempt:
    index: int
    grant: PieceGrant
    started: float
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class SegmentUpload:
    """One upload of one segment; use `run` once."""

    def __init__(
        self,
        pool: ConnectionPool,
        encoder: SegmentEncoder,
        grants: Sequence[PieceGrant],
        order_key: bytes,
        on_bytes: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._pool = pool
        self._encoder = encoder
        self._scheme = encoder.scheme
        self._spares = deque(grants)
        self._key = Ed25519PrivateKey.from_private_bytes(order_key)
        self._on_bytes = on_bytes
        self._pending = deque(range(self._scheme.success))
        self._attempts: dict[int, list[_Attempt]] = {}
        self._receipts: dict[int, Receipt] = {}
        self._durations: list[float] = []
        self._failed: list[tuple[NodeID, str]] = []
        self._sent_bytes = 0
        self._wake = trio.Event()
        self._last_progress = 0.0

    async def run(self) -> PutResult:
        """Upload until all n indices are stored, or as many as can be at the durability line.

        Raises NotEnoughNodes below the line. If cancelled, nodes keep unreferenced pieces that
        garbage collection removes.
        """
        self._last_progress = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._encoder.encode_ahead)
            while not self._finished():
                self._start_pending(nursery)
                self._hedge_slow(nursery)
                self._wake = trio.Event()
                with trio.move_on_after(0.05):
                    await self._wake.wait()
            nursery.cancel_scope.cancel()
        stored = len(self._receipts)
        if stored < self._needed():
            reasons = "; ".join(sorted({reason for _, reason in self._failed})[:3])
            raise NotEnoughNodes(
                f"{stored} of {self._scheme.success} pieces stored, {self._needed()} are needed: "
                f"{reasons or 'nodes too slow'}"
            )
        root = (await self._encoder.tree())[-1][0]
        pieces = tuple(
            StoredPiece(index, receipt) for index, receipt in sorted(self._receipts.items())
        )
        return PutResult(root, pieces, tuple(self._failed), self._sent_bytes)

    def _needed(self) -> int:
        return min(self._scheme.durability_line, self._scheme.success)

    def _finished(self) -> bool:
        if len(self._receipts) == self._scheme.success:
            return True
        if not self._spares and not any(self._attempts.values()):
            return True  # nothing runs and nobody is left to ask
        return trio.current_time() - self._last_progress > DEGRADED_COMMIT_AFTER_S

    def _start_pending(self, nursery: trio.Nursery) -> None:
        while self._pending and self._spares:
            self._start(nursery, self._pending.popleft())

    def _start(self, nursery: trio.Nursery, index: int) -> None:
        attempt = _Attempt(index, self._spares.popleft(), trio.current_time())
        self._attempts.setdefault(index, []).append(attempt)
        nursery.start_soon(self._attempt, attempt)

    def _hedge_slow(self, nursery: trio.Nursery) -> None:
        """Give slow indices a second node, data indices first."""
        if len(self._durations) < QUORUM_BEFORE_HEDGING * self._scheme.success:
            return
        median = sorted(self._durations)[len(self._durations) // 2]
        limit = max(SLOW_FLOOR_S, SLOW_FACTOR * median)
        now = trio.current_time()
        hedges = sum(len(attempts) > 1 for attempts in self._attempts.values())
        for index in sorted(self._attempts):
            attempts = self._attempts[index]
            slow = len(attempts) == 1 and now - attempts[0].started > limit
            if slow and self._spares and hedges < SIMULTANEOUS_HEDGES_MAX:
                hedges += 1
                self._start(nursery, index)

    async def _attempt(self, attempt: _Attempt) -> None:
        index = attempt.index
        try:
            with attempt.scope:
                receipt = await self._send_piece(attempt)
        except DcsError as error:
            log.info("piece upload failed: node=%s index=%d: %s",
                     attempt.grant.limit.node_id, index, error)  # fmt: skip
            self._failed.append((attempt.grant.limit.node_id, str(error)))
            self._attempts[index].remove(attempt)
            if index not in self._receipts and not self._attempts[index]:
                self._requeue(index)
        else:
            self._attempts[index].remove(attempt)
            if not attempt.scope.cancelled_caught and index not in self._receipts:
                self._receipts[index] = receipt
                self._durations.append(trio.current_time() - attempt.started)
                self._last_progress = trio.current_time()
                for other in self._attempts[index]:
                    self._failed.append((other.grant.limit.node_id, "slower than its spare"))
                    other.scope.cancel()
        self._wake.set()

    def _requeue(self, index: int) -> None:
        if index < self._scheme.required:
            self._pending.appendleft(index)
        else:
            self._pending.append(index)

    async def _send_piece(self, attempt: _Attempt) -> Receipt:
        layout, grant = self._encoder.layout, attempt.grant
        order = sign_order(self._key, grant.limit.serial, layout.piece_bytes)
        request = PutPieceRequest(
            grant.limit,
            grant.proof,
            order,
            layout.share_bytes(0),
            layout.stripes,
            layout.piece_bytes,
        )
        async with self._pool.lease(grant.address) as stream:
            try:
                await with_deadline(
                    PIECE_PROGRESS_DEADLINE_S,
                    "opening an upload",
                    lambda: stream.send(PUT_PIECE.code, pack(request)),
                )
                await self._send_shares(stream, attempt.index)
                root, segment_root, path = await self._encoder.piece(attempt.index)
                finish = FinishPiece(attempt.index, self._scheme.success, root, segment_root, path)
                await with_deadline(
                    PIECE_PROGRESS_DEADLINE_S,
                    "sending the piece root",
                    lambda: stream.send(DATA, pack(finish)),
                )
            except Unavailable:
                await self._raise_refusal(stream)
                raise
            frame = await with_deadline(PIECE_PROGRESS_DEADLINE_S, "a receipt", stream.receive)
            receipt = unpack(Receipt, check_reply(frame).header)
        verify_receipt(receipt, grant.limit, root, layout.piece_bytes, grant.node_key)
        return receipt

    async def _send_shares(self, stream: SecureStream, index: int) -> None:
        layout = self._encoder.layout
        with ProgressDeadline(PIECE_PROGRESS_DEADLINE_S, "sending shares") as progress:
            for first in range(0, layout.stripes, PUT_FRAME_SHARES):
                count = min(PUT_FRAME_SHARES, layout.stripes - first)
                shares = await self._encoder.shares(index, first, count)
                await stream.send(DATA, b"", shares)
                progress.step()
                sent = sum(map(len, shares))
                self._sent_bytes += sent
                if len(self._receipts) < self._needed():
                    self._last_progress = trio.current_time()
                self._on_bytes(sent)

    @staticmethod
    async def _raise_refusal(stream: SecureStream) -> None:
        """If the node said why it closed the connection, raise that instead."""
        with trio.move_on_after(1.0):
            try:
                frame = await stream.receive()
            except DcsError:
                return
            check_reply(frame)


async def put_segment(
    pool: ConnectionPool,
    *,
    data: memoryview,
    scheme: RedundancyScheme,
    grants: Sequence[PieceGrant],
    order_key: bytes,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> PutResult:
    """Encode `data` (ciphertext, unchanged meanwhile) and store its pieces; see SegmentUpload."""
    if len(grants) < scheme.durability_line:
        raise NotEnoughNodes(f"{len(grants)} nodes offered, {scheme.durability_line} are needed")
    encoder = SegmentEncoder(data, scheme)
    return await SegmentUpload(pool, encoder, grants, order_key, on_bytes).run()

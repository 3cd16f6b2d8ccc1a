"""A client of one bucket: metadata calls, segment upload, extent reads, and their counters."""

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from dcsfs import keys
from dcsfs.access import AccessGrant
from dcsfs.uplink.packing import PlannedExtent, PlannedSegment, encode_directory
from network import messages as m
from network.download import Deliver, SegmentHandle, SegmentReader
from network.errors import DcsError, IntegrityError
from network.extentmap import Row
from network.ids import ExtentID, NodeID, SegmentID, SessionID
from network.limits import (
    RECORD_BYTES,
    RECORD_PLAINTEXT_BYTES,
    STRIPES_MAX,
    TAG_BYTES,
    UNCACHED_READ_DEADLINE_S,
)
from network.method import Method
from network.redundancy import RedundancyScheme
from network.rpc import ConnectionPool
from network.runtime import ProgressDeadline, Runtime, now_s, with_deadline
from network.transfer import put_segment
from network.transport import SecureStream

log = logging.getLogger(__name__)
Request = TypeVar("Request")
Response = TypeVar("Response")

INLINE_SEGMENT = SegmentID(bytes(16))
_HANDLES_KEPT = 96
SEGMENT_BUFFERS_KEPT = 2
"""Segment buffers are reused: zeroing and first touch of 64 MiB take 50 ms."""
_CRYPTO_BYTES_PER_CALL = 2 * 1024 * 1024
ReadPlain = Callable[[PlannedExtent, int, int], Awaitable[memoryview]]
"""(extent, offset inside it, count) -> exactly that plaintext."""

OnSealed = Callable[[PlannedSegment, memoryview], Awaitable[None]]
"""Called with a segment's ciphertext before it is uploaded."""


@dataclass(slots=True)
class Counters:
    """What `dcsfs status` prints of the network side."""

    sent_bytes: int = 0
    """Share bytes sent to nodes, replacements included."""
    received_bytes: int = 0
    """Verified share bytes received from nodes."""
    segments: int = 0
    satellite_transactions: int = 0
    bad_nodes: dict[str, str] = field(default_factory=dict)
    """Node id -> why: it served bytes that do not match the segment root."""
    slow_or_failed: dict[str, int] = field(default_factory=dict)
    """Node id -> uploads that had to be given to a spare."""


class BucketClient:
    """Calls and transfers for one bucket under one grant."""

    def __init__(
        self, runtime: Runtime, pool: ConnectionPool, grant: AccessGrant, info: m.BucketInfo
    ) -> None:
        self.runtime = runtime
        self.grant = grant
        self.info = info
        self.bucket = info.name
        self.root_key = grant.open_bucket(info.bucket_id, info.wrapped_root_key)
        self.counters = Counters()
        self._pool = pool
        self._handles: OrderedDict[SegmentID, SegmentHandle] = OrderedDict()
        self._reports: set[tuple[SegmentID, int]] = set()
        self._segment_bytes_max = STRIPES_MAX * info.scheme.required * RECORD_BYTES
        self._buffers: list[bytearray] = []
        self._unsent: list[tuple[int, NodeID]] = []

    @property
    def bucket_id(self) -> bytes:
        """The 16 bytes bound into every seal."""
        return self.info.bucket_id

    @property
    def api_key(self) -> bytes:
        """For requests."""
        return self.grant.api_key

    async def call(self, method: Method[Request, Response], request: Request) -> Response:
        """One call to the satellite."""
        return await self._pool.call(self.grant.satellite, method, request)

    def open_stream(self) -> AbstractAsyncContextManager[SecureStream]:
        """A connection to the satellite of one's own; raises Unavailable."""
        return self._pool.lease(self.grant.satellite)

    async def upload_segment(
        self,
        session_id: SessionID,
        plan: PlannedSegment,
        read_plain: ReadPlain,
        on_sealed: OnSealed | None = None,
    ) -> m.PutSegment:
        """Encrypt a planned segment, store its pieces, and return the operation that commits it.

        The buffer of the whole segment lives until this returns. Raises NotEnoughNodes and what
        the satellite raises; if cancelled, nothing refers to what was stored.
        """
        grant = await self.call(
            m.BEGIN_SEGMENT,
            m.BeginSegmentRequest(
                self.api_key, session_id, plan.size, tuple(self._nodes_to_avoid())
            ),
        )
        buffer = self._buffers.pop() if self._buffers else bytearray(self._segment_bytes_max)
        try:
            return await self._fill_and_send(grant, plan, read_plain, on_sealed, buffer)
        finally:
            if len(self._buffers) < SEGMENT_BUFFERS_KEPT:
                self._buffers.append(buffer)

    async def _fill_and_send(
        self,
        grant: m.SegmentGrant,
        plan: PlannedSegment,
        read_plain: ReadPlain,
        on_sealed: OnSealed | None,
        buffer: bytearray,
    ) -> m.PutSegment:
        view = memoryview(buffer)[: plan.size]
        end = 0
        for extent, offset in sorted(plan.extents, key=lambda item: item[1]):
            view[end:offset] = bytes(offset - end)  # a gap must not show an older segment
            await self._encrypt_extent(extent, view[offset:], read_plain)
            end = offset + extent.ciphertext_bytes
        directory = encode_directory(self.root_key, self.info.root.inode, grant.segment_id, plan)
        view[plan.size - len(directory) :] = directory
        if on_sealed is not None:
            await on_sealed(plan, view)
        scheme = grant.scheme
        result = await put_segment(
            self._pool,
            data=view,
            scheme=RedundancyScheme(scheme.required, scheme.repair, scheme.success, scheme.total),
            grants=grant.grants,
            order_key=grant.order_key,
            on_bytes=self._count_sent,
        )
        self.counters.segments += 1
        for node_id, _ in result.failed_nodes:
            name = str(node_id)
            failures = self.counters.slow_or_failed
            failures[name] = failures.get(name, 0) + 1
        placements = tuple(
            m.Placement(extent.extent_id, grant.segment_id, offset, extent.ciphertext_bytes)
            for extent, offset in plan.extents
        )
        return m.PutSegment(
            grant.segment_id, plan.size, result.segment_root, result.pieces, placements
        )

    def _nodes_to_avoid(self) -> list[NodeID]:
        repeated = [n for n, count in self.counters.slow_or_failed.items() if count > 1]
        return [NodeID.parse(name) for name in [*self.counters.bad_nodes, *repeated][:200]]

    def _count_sent(self, count: int) -> None:
        self.counters.sent_bytes += count

    def _count_received(self, count: int) -> None:
        self.counters.received_bytes += count

    async def _encrypt_extent(
        self, extent: PlannedExtent, target: memoryview, read_plain: ReadPlain
    ) -> None:
        position = 0
        while position < extent.length:
            count = min(_CRYPTO_BYTES_PER_CALL, extent.length - position)
            plain = await read_plain(extent, position, count)
            record = position // RECORD_PLAINTEXT_BYTES
            out = target[record * RECORD_BYTES :][: keys.ciphertext_bytes(count)]
            last = position + count == extent.length
            keys.encrypt_records(extent.content_key, extent.extent_id, record, plain, last, out)
            await trio.lowlevel.checkpoint()
            position += count

    async def _handle(self, segment_id: SegmentID) -> SegmentHandle:
        handle = self._handles.get(segment_id)
        if handle is None or not handle.usable(now_s(self.runtime)):
            reply = await self.call(
                m.OPEN_SEGMENTS,
                m.OpenSegmentsRequest(self.api_key, self.bucket, (segment_id,)),
            )
            handle = self._handles[segment_id] = SegmentHandle(reply.segments[0])
            while len(self._handles) > _HANDLES_KEPT:
                self._handles.popitem(last=False)
        self._handles.move_to_end(segment_id)
        return handle

    async def read_ciphertext(
        self, placement: m.Placement, start: int, end: int
    ) -> list[memoryview]:
        """Bytes [start, end) of an extent's ciphertext in consecutive parts, verified.

        Raises TooFewShares, IntegrityError, NotFound (the extent has moved), Unavailable; never
        takes longer than the uncached read deadline.
        """
        found: list[memoryview] = []

        async def collect(parts: list[memoryview]) -> None:
            found.extend(parts)

        await with_deadline(
            UNCACHED_READ_DEADLINE_S,
            "reading from the network",
            lambda: self._stream_ciphertext(placement, start, end, collect),
        )
        return found

    async def stream_ciphertext(
        self, placement: m.Placement, start: int, end: int, deliver: Deliver
    ) -> None:
        """As `read_ciphertext`, handing the parts to `deliver` as they come, in order.

        The deadline holds between two deliveries: a slow link takes its time over a long range.
        """
        with ProgressDeadline(UNCACHED_READ_DEADLINE_S, "reading from the network") as progress:

            async def step(parts: list[memoryview]) -> None:
                progress.step()
                await deliver(parts)

            await self._stream_ciphertext(placement, start, end, step)

    async def _stream_ciphertext(
        self, placement: m.Placement, start: int, end: int, deliver: Deliver
    ) -> None:
        if placement.segment_id == INLINE_SEGMENT:
            reply = await self.call(
                m.GET_INLINE,
                m.InlineRequest(self.api_key, self.bucket, placement.extent_id),
            )
            if len(reply.ciphertext) != placement.ciphertext_bytes:
                raise IntegrityError(f"extent {placement.extent_id} has the wrong length")
            await deliver([memoryview(reply.ciphertext)[start:end]])
            return
        handle = await self._handle(placement.segment_id)
        if placement.offset + placement.ciphertext_bytes > handle.layout.size:
            raise IntegrityError(f"extent {placement.extent_id} passes its segment's end")
        reader = SegmentReader(self._pool, handle, self._note_bad_node, self._count_received)
        try:
            await reader.stream(placement.offset + start, placement.offset + end, deliver)
        finally:
            if self._unsent:
                with trio.move_on_after(2, shield=True):
                    await self._send_reports(placement.segment_id)

    def _note_bad_node(self, grant: m.PieceGrant, reason: str) -> None:
        self.counters.bad_nodes[str(grant.limit.node_id)] = reason
        self._unsent.append((grant.index, grant.limit.node_id))

    async def _send_reports(self, segment_id: SegmentID) -> None:
        """Tell the satellite about bad nodes; a failure to do so is not the reader's concern."""
        pending, self._unsent = self._unsent, []
        for index, node_id in pending:
            if (segment_id, index) in self._reports:
                continue
            self._reports.add((segment_id, index))
            try:
                await self.call(
                    m.REPORT_NODE, m.ReportNodeRequest(self.api_key, segment_id, index, node_id)
                )
            except DcsError as error:
                log.info("report not delivered: node=%s: %s", node_id, error)

    async def read_extent(
        self, content_key: bytes, row: Row, placement: m.Placement, start: int, end: int
    ) -> memoryview:
        """Plaintext bytes [start, end) of an extent: whole records are read and authenticated."""
        first = start // RECORD_PLAINTEXT_BYTES
        last = -(-end // RECORD_PLAINTEXT_BYTES)
        cipher_end = min(last * RECORD_BYTES, placement.ciphertext_bytes)
        parts = await self.read_ciphertext(placement, first * RECORD_BYTES, cipher_end)
        plain = await self.decrypt(content_key, row.extent_id, placement, first, parts)
        base = first * RECORD_PLAINTEXT_BYTES
        return plain[start - base : end - base]

    async def decrypt(
        self,
        content_key: bytes,
        extent_id: ExtentID,
        placement: m.Placement,
        first: int,
        parts: list[memoryview],
    ) -> memoryview:
        """Decrypt consecutive whole records from number `first` on; raises IntegrityError.

        Parts that are whole records, as shares of full stripes are, are decrypted where they lie.
        """
        records = -(-placement.ciphertext_bytes // RECORD_BYTES)
        if any(len(part) % RECORD_BYTES for part in parts[:-1]):
            parts = [memoryview(b"".join(parts))]
        total = sum(len(part) for part in parts)
        plain = memoryview(bytearray(total - TAG_BYTES * -(-total // RECORD_BYTES)))
        record, position = first, 0
        for number, part in enumerate(parts):
            count = -(-len(part) // RECORD_BYTES)
            size = len(part) - TAG_BYTES * count
            target = plain[position : position + size]
            keys.decrypt_records(content_key, extent_id, record, records, part, target)
            record, position = record + count, position + size
            if number % 32 == 31:
                await trio.lowlevel.checkpoint()
        return plain

    def forget_segment(self, segment_id: SegmentID) -> None:
        """Drop a handle, after NotFound: the extent may have been repacked."""
        self._handles.pop(segment_id, None)


async def open_bucket(
    runtime: Runtime, pool: ConnectionPool, grant: AccessGrant, name: str
) -> BucketClient:
    """Find a bucket and open its root key; raises NotFound, WrongPassphrase, Unavailable."""
    info = await pool.call(grant.satellite, m.GET_BUCKET, m.BucketRequest(grant.api_key, name))
    return BucketClient(runtime, pool, grant, info)

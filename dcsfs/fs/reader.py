"""Read file content: log, memory, clean cache, network, in that order, with prefetch.

Runs of 1 MiB are fetched in spans of consecutive ciphertext, so that a sequential reader keeps
many nodes busy; a random small read fetches just the records it touches.
"""

import logging
from collections import OrderedDict, deque
from dataclasses import dataclass

import trio

from dcsfs.cache.clean import RUN_RECORDS
from dcsfs.cache.log import Position, RecordTrimmed
from dcsfs.fs import loader
from dcsfs.fs.state import Inode, Layer, Piece, resolve
from dcsfs.fs.volume import Volume
from network.errors import DcsError, IntegrityError, NotFound
from network.extentmap import Row
from network.ids import ExtentID
from network.limits import RECORD_BYTES, RECORD_PLAINTEXT_BYTES, UNCACHED_READ_DEADLINE_S
from network.messages import InodeRecord, Placement
from network.runtime import with_deadline
from network.units import MiB

log = logging.getLogger(__name__)

RUN_BYTES = RUN_RECORDS * RECORD_PLAINTEXT_BYTES
RUN_CIPHERTEXT = RUN_RECORDS * RECORD_BYTES
RUNS_KEPT = 104
"""Decrypted runs in memory: 104 MiB."""
PASSED_RUNS_KEPT = 8
"""Of those a stream has read to the end: the kernel's requests may come out of order."""
REACH_BYTES_MAX = (RUNS_KEPT - PASSED_RUNS_KEPT) * RUN_BYTES
"""Nothing further ahead is fetched: it would push out what has not been read yet."""
SPAN_RUNS_MAX = 60
"""A streamed segment in one request per node."""
WINDOW_BYTES_MIN = 2 * MiB
WINDOW_BYTES_MAX = 64 * MiB
TOP_UP_BYTES = 32 * MiB
"""With this much left to read, a stream's next segment is asked for."""
RANDOM_READ_BYTES_MAX = 64 * 1024
OUT_OF_ORDER_BYTES_MAX = 8 * MiB
_LOG_RECORDS_KEPT = 4


@dataclass(slots=True)
class ReadState:
    """What an open handle remembers of its reader."""

    next_offset: int = 0
    window: int = WINDOW_BYTES_MIN
    fetched_to: int = 0


RunKey = tuple[ExtentID, int]


@dataclass(frozen=True, slots=True)
class _Wanted:
    key: RunKey
    placement: Placement
    content_key: bytes

    @property
    def start(self) -> int:
        """Offset of the run in its segment."""
        return self.placement.offset + self.key[1] * RUN_CIPHERTEXT

    @property
    def length(self) -> int:
        """Ciphertext bytes of the run."""
        rest = self.placement.ciphertext_bytes - self.key[1] * RUN_CIPHERTEXT
        return min(RUN_CIPHERTEXT, rest)


class MapChanged(Exception):
    """Another session has committed the file while it was read: its map is loaded anew."""


def _placement_of(inode: Inode, row: Row) -> Placement:
    placement = inode.placements.get(row.extent_id)
    if placement is None:
        raise MapChanged
    return placement


class Reader:
    """Reads for one volume; fetch tasks live in the nursery it is given."""

    def __init__(self, volume: Volume, nursery: trio.Nursery) -> None:
        self._volume = volume
        self._client = volume.client
        self._nursery = nursery
        self._runs: OrderedDict[RunKey, memoryview] = OrderedDict()
        self._passed: OrderedDict[RunKey, None] = OrderedDict()
        self._fetching: dict[RunKey, trio.Event] = {}
        self._failures: dict[RunKey, Exception] = {}
        self._records: OrderedDict[int, memoryview] = OrderedDict()
        self._map_locks: dict[int, trio.Event] = {}

    async def rows_of(self, inode: Inode) -> list[Row]:
        """The committed map, loaded once; raises IntegrityError, Unavailable."""
        while inode.rows is None:
            busy = self._map_locks.get(inode.number)
            if busy is not None:
                await busy.wait()
                continue
            done = self._map_locks[inode.number] = trio.Event()
            try:
                record, rows, placements = await loader.load_map(self._client, inode)
                if record.content_version != inode.content_version:
                    self._follow(inode, record)
                if inode.rows is None:
                    inode.rows, inode.placements = rows, placements
            finally:
                del self._map_locks[inode.number]
                done.set()
        return inode.rows

    def _follow(self, inode: Inode, record: InodeRecord) -> None:
        """Take over what another session has committed since the inode was loaded."""
        if not (self._volume.is_read_only or self._volume.is_shared):
            raise IntegrityError(f"inode {inode.number} was changed by somebody else")
        fresh = loader.inode_from(self._client, record, inode.key, inode.parent)
        self._volume.follow(inode, fresh)

    async def read(
        self, inode: Inode, offset: int, size: int, state: ReadState
    ) -> bytes | memoryview:
        """Bytes [offset, offset + size) as far as the file goes.

        Raises within the uncached read deadline: TooFewShares, IntegrityError, Unavailable.
        """
        end = min(offset + size, inode.size)
        if offset >= end:
            return b""
        # The kernel's read-ahead keeps requests in flight that may arrive out of order.
        is_sequential = abs(offset - state.next_offset) <= OUT_OF_ORDER_BYTES_MAX
        state.next_offset = max(state.next_offset, end) if is_sequential else end
        while True:
            try:
                return await self._read_now(inode, offset, end, state, is_sequential)
            except (RecordTrimmed, MapChanged):
                continue  # committed while this read waited: it is in a segment now

    async def _read_now(
        self, inode: Inode, offset: int, end: int, state: ReadState, is_sequential: bool
    ) -> bytes | memoryview:
        rows = inode.rows if inode.rows is not None else await self.rows_of(inode)
        pieces = resolve(inode, offset, end, rows)
        if is_sequential and any(piece.row for piece in pieces):
            self._prefetch(inode, rows, offset, end, state)
        elif not is_sequential:
            state.window, state.fetched_to = WINDOW_BYTES_MIN, 0
        if len(pieces) == 1:
            return await self._read_piece(inode, pieces[0], is_sequential)
        target = bytearray(end - offset)
        for piece in pieces:
            part = await self._read_piece(inode, piece, is_sequential)
            target[piece.start - offset : piece.end - offset] = part
        return memoryview(target)

    async def read_layer(self, inode: Inode, layer: Layer, start: int, end: int) -> memoryview:
        """Bytes of a file as of one of its layers: what a flush of that layer must send."""
        while True:
            try:
                return await self._read_layer_now(inode, layer, start, end)
            except (RecordTrimmed, MapChanged):
                continue  # a lower layer was committed meanwhile

    async def _read_layer_now(self, inode: Inode, layer: Layer, start: int, end: int) -> memoryview:
        below = inode.layers[: inode.layers.index(layer) + 1]
        view = Inode(
            inode.number, inode.generation, inode.kind, inode.key, 0, 1, 0, 0, 0, 0, 0, 0, end
        )
        rows = await self.rows_of(inode)
        view.layers, view.placements = below, inode.placements
        target = memoryview(bytearray(end - start))
        for piece in resolve(view, start, end, rows):
            part = await self._read_piece(view, piece, True)
            target[piece.start - start : piece.end - start] = part
        return target

    async def _read_piece(
        self, inode: Inode, piece: Piece, is_sequential: bool
    ) -> bytes | memoryview:
        if piece.staged is not None:
            run = piece.staged
            payload = self._log_record(run.source)
            return payload[run.source_offset : run.source_offset + run.end - run.start]
        if piece.row is None:
            return bytes(piece.end - piece.start)
        return await self._read_row(inode, piece.row, is_sequential)

    def _log_record(self, position: Position) -> memoryview:
        found = self._records.get(position.sequence)
        if found is None:
            found = self._records[position.sequence] = self._volume.log.read(position)
            while len(self._records) > _LOG_RECORDS_KEPT:
                self._records.popitem(last=False)
        return found

    async def _read_row(self, inode: Inode, row: Row, is_sequential: bool) -> bytes | memoryview:
        start, end = row.extent_offset, row.extent_offset + row.length
        first, last = start // RUN_BYTES, (end - 1) // RUN_BYTES
        if not is_sequential and row.length <= RANDOM_READ_BYTES_MAX and first == last:
            known = await self._cached_run(inode, row, first)
            if known is None:
                return await self._read_records(inode, row)
            return known[start - first * RUN_BYTES : end - first * RUN_BYTES]
        parts = []
        for number in range(first, last + 1):
            plain = await self._run(inode, row, number)
            base = number * RUN_BYTES
            parts.append(plain[max(0, start - base) : end - base])
            if is_sequential and end - base >= len(plain):
                self._passed[row.extent_id, number] = None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _wanted(self, inode: Inode, row: Row, number: int) -> _Wanted:
        placement = _placement_of(inode, row)
        return _Wanted((row.extent_id, number), placement, inode.key.content)

    async def _read_records(self, inode: Inode, row: Row) -> memoryview:
        placement = _placement_of(inode, row)
        start, end = row.extent_offset, row.extent_offset + row.length
        return await self._client.read_extent(inode.key.content, row, placement, start, end)

    async def _cached_run(self, inode: Inode, row: Row, number: int) -> memoryview | None:
        """A run from memory, a fetch on its way, or the clean cache; None if none has it."""
        wanted = self._wanted(inode, row, number)
        found = self._runs.get(wanted.key)
        if found is not None:
            self._runs.move_to_end(wanted.key)
            return found
        if wanted.key in self._fetching:
            return await self._run(inode, row, number)
        return await self._from_clean(wanted)

    async def _from_clean(self, wanted: _Wanted) -> memoryview | None:
        extent_id, number = wanted.key
        data = await self._volume.clean.get(extent_id, number)
        if data is None or len(data) != wanted.length:
            return None
        try:
            plain = await self._client.decrypt(
                wanted.content_key, extent_id, wanted.placement,
                number * RUN_RECORDS, [memoryview(data)],
            )  # fmt: skip
        except IntegrityError as error:
            log.warning("clean cache run is damaged and dropped: %s", error)
            await self._volume.clean.drop(extent_id, number)
            return None
        self._keep(wanted.key, plain)
        return plain

    def _keep(self, key: RunKey, plain: memoryview) -> None:
        """Remember a run; what a stream has read through goes first, then the least recent."""
        self._runs[key] = plain
        while len(self._runs) > RUNS_KEPT:
            if len(self._passed) > PASSED_RUNS_KEPT:
                self._runs.pop(self._passed.popitem(last=False)[0], None)
            else:
                oldest, _ = self._runs.popitem(last=False)
                self._passed.pop(oldest, None)

    async def _run(self, inode: Inode, row: Row, number: int) -> memoryview:
        wanted = self._wanted(inode, row, number)
        while True:
            found = self._runs.get(wanted.key)
            if found is not None:
                self._runs.move_to_end(wanted.key)
                return found
            busy = self._fetching.get(wanted.key)
            if busy is None:
                self._start_fetch([wanted])
                busy = self._fetching[wanted.key]
            waiting = busy
            await with_deadline(
                UNCACHED_READ_DEADLINE_S + 2, "reading from the network", waiting.wait
            )
            failure = self._failures.pop(wanted.key, None)
            if failure is not None:
                raise failure

    def _prefetch(
        self, inode: Inode, rows: list[Row], offset: int, end: int, state: ReadState
    ) -> None:
        """Have the network work ahead of a sequential reader."""
        if state.fetched_to < end:
            state.fetched_to = offset
        elif state.fetched_to - end > min(state.window // 2, TOP_UP_BYTES):
            return
        target = min(inode.size, end + state.window)
        # A segment that is begun is fetched whole, in one request to each node.
        is_stream = state.window == WINDOW_BYTES_MAX
        reach = min(inode.size, target + SPAN_RUNS_MAX * RUN_BYTES) if is_stream else target
        state.window = min(2 * state.window, WINDOW_BYTES_MAX)
        wanted = self._runs_in(inode, rows, state.fetched_to, reach)
        state.fetched_to = target
        for span in _spans([item for _, item in wanted]):
            first, last = wanted[0][0], wanted[len(span) - 1][0]
            del wanted[: len(span)]
            if first >= target:
                break
            if last + RUN_BYTES > end + REACH_BYTES_MAX:
                state.fetched_to = first
                break
            state.fetched_to = max(state.fetched_to, min(inode.size, last + RUN_BYTES))
            unknown = [i for i in span if i.key not in self._runs and i.key not in self._fetching]
            for part in _spans(unknown):
                self._start_fetch(part)

    def _runs_in(
        self, inode: Inode, rows: list[Row], start: int, end: int
    ) -> list[tuple[int, _Wanted]]:
        """(file offset, run) of every committed run that holds bytes of [start, end)."""
        found: list[tuple[int, _Wanted]] = []
        for piece in resolve(inode, start, end, rows):
            if piece.row is None:
                continue
            begin = piece.row.extent_offset
            first, last = begin // RUN_BYTES, (begin + piece.row.length - 1) // RUN_BYTES
            for number in range(first, last + 1):
                item = self._wanted(inode, piece.row, number)
                if not found or found[-1][1].key != item.key:
                    found.append((piece.start + number * RUN_BYTES - begin, item))
        return found

    def _start_fetch(self, span: list[_Wanted]) -> None:
        for item in span:
            self._fetching[item.key] = trio.Event()
        self._nursery.start_soon(self._fetch, span)

    async def _fetch(self, span: list[_Wanted]) -> None:
        failure: Exception | None = None
        try:
            missing = []
            for item in span:
                if await self._from_clean(item) is None:
                    missing.append(item)
                else:
                    self._arrived(item.key)
            for part in _spans(missing):
                await self._fetch_span(part)
        except (DcsError, OSError) as error:
            failure = error
            log.info("fetch failed: %s", error)
        finally:
            for item in span:
                if failure is not None and item.key in self._fetching:
                    self._failures[item.key] = failure
                self._arrived(item.key)
            while len(self._failures) > 4096:
                self._failures.pop(next(iter(self._failures)))

    def _arrived(self, key: RunKey) -> None:
        waiting = self._fetching.pop(key, None)
        if waiting is not None:
            waiting.set()

    async def _fetch_span(self, span: list[_Wanted]) -> None:
        """Fetch runs whose ciphertext is consecutive in one segment; each can be read at once."""
        whole = Placement(
            span[0].key[0],
            span[0].placement.segment_id,
            span[0].start,
            sum(item.length for item in span),
        )
        clean = self._volume.clean
        is_kept = self._volume.keeps_clean and not clean.is_putting
        kept: list[tuple[ExtentID, int, list[memoryview]]] = []
        waiting = deque(span)
        rest: list[memoryview] = []

        async def deliver(parts: list[memoryview]) -> None:
            nonlocal rest
            rest += parts
            while waiting and sum(map(len, rest)) >= waiting[0].length:
                item = waiting.popleft()
                own, rest = _take(rest, item.length)
                plain = await self._client.decrypt(
                    item.content_key, item.key[0], item.placement, item.key[1] * RUN_RECORDS, own
                )
                self._keep(item.key, plain)
                self._arrived(item.key)
                if is_kept:
                    kept.append((item.key[0], item.key[1], own))

        try:
            await self._client.stream_ciphertext(whole, 0, whole.ciphertext_bytes, deliver)
        except NotFound:
            self._client.forget_segment(whole.segment_id)
            raise
        if kept:
            self._nursery.start_soon(clean.put, kept)


def _take(parts: list[memoryview], count: int) -> tuple[list[memoryview], list[memoryview]]:
    """Split consecutive parts after `count` bytes."""
    for number, part in enumerate(parts):
        if count <= len(part):
            rest = [part[count:]] if count < len(part) else []
            return [*parts[:number], part[:count]], rest + parts[number + 1 :]
        count -= len(part)
    raise IntegrityError("fewer bytes than the segment holds")


def _spans(wanted: list[_Wanted]) -> list[list[_Wanted]]:
    """Group runs that follow each other in a segment, at most SPAN_RUNS_MAX together."""
    spans: list[list[_Wanted]] = []
    for item in wanted:
        previous = spans[-1][-1] if spans else None
        if (
            previous is not None
            and len(spans[-1]) < SPAN_RUNS_MAX
            and previous.placement.segment_id == item.placement.segment_id
            and previous.start + previous.length == item.start
            and any(item.placement.segment_id)
        ):
            spans[-1].append(item)
        else:
            spans.append([item])
    return spans

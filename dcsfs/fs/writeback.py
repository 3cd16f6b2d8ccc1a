"""Bring frozen batches to the satellite: seal extents, pack, upload, apply, trim the log.

Batches go in order, one at a time, each in one satellite transaction: its content is uploaded
first, so a visible inode names only committed extents. A FLUSH record is on disk before the
transaction is sent; a crash after that is resolved by asking the satellite how far it came.
"""

import logging
from contextlib import suppress

import trio
from blake3 import blake3

from dcsfs import keys
from dcsfs.cache.clean import RUN_RECORDS
from dcsfs.fs import building, journal
from dcsfs.fs.conflicts import Conflicts
from dcsfs.fs.reader import Reader
from dcsfs.fs.state import Batch, Content, Inode, Layer, Prepared
from dcsfs.fs.throttle import DrainRate
from dcsfs.fs.volume import Volume
from dcsfs.keys import Sealed
from dcsfs.uplink.client import INLINE_SEGMENT
from dcsfs.uplink.packing import PlannedExtent, PlannedSegment, pack_extents
from network import extentmap
from network import messages as m
from network.codec import pack
from network.errors import (
    DcsError,
    PermissionDenied,
    PreconditionFailed,
    QuotaExceeded,
    Unauthenticated,
    Unavailable,
    error_from_wire,
)
from network.extentmap import Row
from network.ids import ExtentID, Hash
from network.limits import (
    EXTENT_PLAINTEXT_BYTES_MAX,
    FILE_BYTES_MAX,
    FLUSH_INTERVAL_S,
    MAP_ROWS_PER_MIB_MAX,
    RECORD_BYTES,
    STRIPES_MAX,
)
from network.units import MiB

log = logging.getLogger(__name__)

Update = tuple[m.Operation, Inode, Content | None]
"""What brings one touched inode up to date."""

FLUSH_AT_BYTES = 56 * MiB
"""Seven extents of 8 MiB: a segment with room left for what arrives while it is cut."""
UPLOADS_AT_ONCE = 2
"""One segment's receipts are waited for while the next is encoded."""
BATCHES_AHEAD_MAX = 3
INLINE_BATCH_BYTES_MAX = 4096
INLINE_DEMANDED_BYTES_MAX = 64 * 1024
RETRY_FIRST_S = 1.0
RETRY_LAST_S = 15.0


class Refused(Exception):
    """The satellite has refused an operation of a batch, and so the batch."""

    def __init__(self, operation: m.Operation, error: DcsError) -> None:
        super().__init__(f"the satellite refused {type(operation).__name__}: {error}")
        self.operation = operation
        self.error = error


class Writeback:
    """Flushes one volume; `run` is its background task."""

    def __init__(self, volume: Volume, reader: Reader) -> None:
        self._volume = volume
        self._client = volume.client
        self._reader = reader
        self._commit_lock = trio.Lock()
        self.conflicts = Conflicts(volume)
        volume.on_freeze = self._announce
        scheme = volume.client.info.scheme
        self._segment_bytes_max = STRIPES_MAX * scheme.required * RECORD_BYTES
        # A power of two under the window size, and small enough to fit a narrow scheme's segment.
        self._extent_bytes_max = EXTENT_PLAINTEXT_BYTES_MAX
        while keys.ciphertext_bytes(self._extent_bytes_max) + 4096 > self._segment_bytes_max:
            self._extent_bytes_max //= 2
        self._demanded = trio.Event()
        self._retry = trio.Event()
        self._uploading: set[int] = set()
        self._progress = trio.Event()
        self.last_error = ""
        self._refusals = 0
        self.refusal: DcsError | None = None
        """Why the network will not take what is staged until somebody does something about it."""
        self.flushed_batches = 0
        self.drain_rate = DrainRate()

    async def run(self) -> None:
        """Freeze, upload and commit until cancelled; failures are retried with back-off."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._freeze_forever)
            nursery.start_soon(self._upload_forever, nursery)
            await self._commit_forever()

    def _announce(self) -> None:
        self._progress.set()
        self._progress = trio.Event()

    async def _freeze_forever(self) -> None:
        """Close the open batch by size, age and demand; not far ahead of the network."""
        while True:
            while len(self._volume.queue) >= BATCHES_AHEAD_MAX:
                await self._progress.wait()
            await self._wait_for_work()
            self._volume.freeze()

    async def _wait_for_work(self) -> None:
        """Return when the open batch should go: size, age or demand."""
        while True:
            self._demanded = trio.Event()
            batch = self._volume.open_batch
            if not batch:
                self._volume.flush_wanted = trio.Event()
                await self._volume.flush_wanted.wait()
                continue
            age = trio.current_time() - batch.opened_at
            large = batch.data_bytes >= FLUSH_AT_BYTES
            if batch.is_demanded or large or age >= FLUSH_INTERVAL_S:
                return
            with trio.move_on_after(min(0.2, FLUSH_INTERVAL_S - age)):
                await self._demanded.wait()

    async def _upload_forever(self, nursery: trio.Nursery) -> None:
        """Keep the first batches of the queue on their way to the nodes."""
        while True:
            progress = self._progress
            for batch in list(self._volume.queue)[:UPLOADS_AT_ONCE]:
                if id(batch) not in self._uploading and batch.prepared is None:
                    self._uploading.add(id(batch))
                    nursery.start_soon(self._upload_batch, batch)
            await progress.wait()

    async def _upload_batch(self, batch: Batch) -> None:
        delay = RETRY_FIRST_S
        while True:
            try:
                batch.prepared = await self._prepare(batch)
                break
            except (DcsError, OSError) as error:
                await self._back_off(error, delay)
                delay = min(2 * delay, RETRY_LAST_S)
        self._uploading.discard(id(batch))
        self._announce()

    async def _back_off(self, error: Exception, delay: float) -> None:
        self.last_error = str(error)
        if isinstance(error, PermissionDenied | Unauthenticated | QuotaExceeded):
            self.refusal = error
            self._refusals += 1
        log.warning("flush failed, data stays safe in the local log: %s", error)
        self._announce()
        retry = self._retry
        await trio.sleep(min(delay, RETRY_FIRST_S))
        with trio.move_on_after(delay - RETRY_FIRST_S):
            await retry.wait()

    async def _commit_forever(self) -> None:
        """Commit prepared batches in order."""
        delay = RETRY_FIRST_S
        refused_before: m.Operation | None = None
        while True:
            batch = self._volume.queue[0] if self._volume.queue else None
            if batch is None or batch.prepared is None:
                await self._progress.wait()
                continue
            try:
                async with self._commit_lock:
                    if not await self._is_ready(batch):
                        self._announce()
                        continue
                    await self._commit(batch)
                    self._volume.queue.popleft()
            except Refused as refused:
                is_repeated = refused.operation == refused_before
                refused_before = refused.operation
                if not is_repeated and await self._settled(batch, refused):
                    batch.prepared = None
                else:
                    refused_before = None
                    if _must_be_prepared_anew(batch, refused.operation):
                        batch.prepared = None
                    is_known = isinstance(refused.error, QuotaExceeded)
                    await self._back_off(refused.error if is_known else refused, delay)
                    delay = min(2 * delay, RETRY_LAST_S)
                self._announce()
                continue
            except (DcsError, OSError) as error:
                batch.prepared = None
                await self._back_off(error, delay)
                delay = min(2 * delay, RETRY_LAST_S)
                continue
            self.flushed_batches += 1
            self.drain_rate.note(batch.data_bytes, trio.current_time())
            self.last_error, self.refusal, delay = "", None, RETRY_FIRST_S
            self._announce()

    async def _is_ready(self, batch: Batch) -> bool:
        """Whether a batch may be committed now: settling another may have unmade its content."""
        await self.conflicts.spare(batch)
        return batch.prepared is not None

    async def _settled(self, batch: Batch, refused: Refused) -> bool:
        """Whether a refused batch has been changed so that it may go now."""
        try:
            return await self.conflicts.settle(batch, refused.operation, refused.error)
        except (DcsError, OSError) as error:
            log.warning("conflict not settled yet: %s", error)
            return False

    async def flush_names(self) -> bool:
        """Commit all names and attributes changed so far; their content follows in its time.

        Waits as long as the satellite does not answer. False when it refuses something.
        """
        self._volume.freeze()
        async with self._commit_lock:
            for batch in list(self._volume.queue):
                try:
                    await self._commit_names(batch)
                except Refused as refused:
                    log.warning("names not committed: %s", refused)
                    return False
        self._announce()
        return True

    async def _commit_names(self, batch: Batch) -> None:
        """Commit a batch but for its content, which becomes all there is in it."""
        updates = self._attribute_operations(batch, dict(batch.touched))
        if not batch.operations and not updates:
            return
        operations = [*batch.operations, *(operation for operation, _, _ in updates)]
        await self._apply(journal.NAMES_FLUSH, batch.last_sequence, operations)
        self._adopt_seals(batch, updates)
        batch.operations, batch.weight = [], 0
        batch.touched = {number: batch.touched[number] for number in batch.layers}

    def demand(self) -> None:
        """Flush what there is now, whatever its age and size."""
        self._volume.open_batch.is_demanded = bool(self._volume.open_batch)
        self._demanded.set()
        self._try_again()

    def _try_again(self) -> None:
        """What has failed is tried now, not at the end of its back-off."""
        self._retry.set()
        self._retry = trio.Event()

    def note_write(self) -> None:
        """Wake the flusher when enough is staged."""
        if self._volume.open_batch.data_bytes >= FLUSH_AT_BYTES:
            self._demanded.set()

    async def next_progress(self) -> None:
        """Wait until a flush has ended, well or not."""
        await self._progress.wait()

    async def commit_inode(self, inode: Inode) -> None:
        """Return once what is staged of an inode's content is committed, or the network refuses it.

        Waits as long as that takes; the caller may cancel.
        """
        layers = list(inode.layers)
        while self.refusal is None and any(layer in inode.layers for layer in layers):
            self.demand()
            progress = self._progress
            with trio.move_on_after(1.0):
                await progress.wait()

    async def drain(self, *, or_refusal: bool = False) -> None:
        """Return once everything changed before this call is committed at the satellite.

        Waits as long as that takes; the caller sets the deadline and may cancel. With
        `or_refusal`, tries at once and raises why the network will not take it.
        """
        before = self._refusals
        self._try_again()
        target = self._volume.open_batch
        waiting = [*self._volume.queue, *([target] if target else [])]
        while any(
            batch is self._volume.open_batch or batch in self._volume.queue for batch in waiting
        ):
            if or_refusal and self.refusal is not None and self._refusals > before:
                raise self.refusal
            if target is self._volume.open_batch:
                self.demand()
            progress = self._progress
            with trio.move_on_after(1.0):
                await progress.wait()

    async def _prepare(self, batch: Batch) -> Prepared:
        """Upload a batch's content; what remains is one transaction."""
        if batch.is_overtaken:
            await self.conflicts.settle_overtaken(batch)
        contents = await self._plan(batch)
        extents = [extent for content in contents for extent in content.extents]
        by_extent = {
            extent.extent_id: content for content in contents for extent in content.extents
        }
        prepared = Prepared(contents)
        total = sum(extent.length for extent in extents)
        limit = INLINE_DEMANDED_BYTES_MAX if batch.is_demanded else INLINE_BATCH_BYTES_MAX
        if extents and total <= limit:
            await self._seal_inline(extents, by_extent, prepared)
        else:
            for plan in pack_extents(extents, self._segment_bytes_max):
                await self._upload(plan, by_extent, prepared)
        return prepared

    async def _commit(self, batch: Batch) -> None:
        prepared = batch.prepared
        assert prepared is not None
        updates = self._update_operations(batch, prepared.contents)
        operations = [*prepared.operations, *batch.operations]
        operations += [operation for operation, _, _ in updates]
        if operations:
            await self._apply(journal.FLUSH, batch.last_sequence, operations)
        self._finish(batch, prepared, updates)

    async def _plan(self, batch: Batch) -> list[Content]:
        contents = []
        for number, layer in batch.layers.items():
            inode, frozen = batch.touched[number], batch.frozen[number]
            if frozen.dead or inode.is_reaped or _is_cut_later(inode, layer):
                continue
            if layer.cut == 0 and inode.rows is None and layer is inode.layers[0]:
                inode.rows, inode.placements = [], {}  # nothing of it can be seen any more
            rows = await self._reader.rows_of(inode)
            content = Content(inode, layer, frozen, inode.foreign_changes)
            for start, end in self._ranges(layer, self._size_of(content), rows):
                content.extents += self._cut_extents(inode, start, end)
            contents.append(content)
        return contents

    def _ranges(self, layer: Layer, size: int, rows: list[Row]) -> list[tuple[int, int]]:
        """Byte ranges to seal: what is dirty, and whole MiBs that would have too many rows."""
        merged: list[tuple[int, int]] = []
        for run in layer.data.runs:
            if merged and merged[-1][1] == run.start:
                merged[-1] = (merged[-1][0], run.end)
            else:
                merged.append((run.start, run.end))
        crowded: dict[int, int] = {}
        for start, end in merged:
            for number in range(start // MiB, (end - 1) // MiB + 1):
                crowded[number] = crowded.get(number, 0) + 2
        rewrite = set()
        for number, added in crowded.items():
            first, last = extentmap.overlapping(rows, number * MiB, (number + 1) * MiB)
            if last - first + added > MAP_ROWS_PER_MIB_MAX:
                rewrite.add(number)
        if not rewrite:
            return merged
        covered = [(n * MiB, min((n + 1) * MiB, size)) for n in rewrite] + merged
        covered.sort()
        joined: list[tuple[int, int]] = []
        for start, end in covered:
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(joined[-1][1], end))
            else:
                joined.append((start, end))
        return joined

    def _cut_extents(self, inode: Inode, start: int, end: int) -> list[PlannedExtent]:
        """Cut a range at multiples of the extent size: rows never cross a map window."""
        found = []
        while start < end:
            border = (start // self._extent_bytes_max + 1) * self._extent_bytes_max
            stop = min(end, border)
            extent_id = ExtentID(self._volume.runtime.random_bytes(16))
            found.append(
                PlannedExtent(
                    extent_id, inode.number, inode.generation, start, stop - start,
                    inode.key.content,
                )
            )  # fmt: skip
            start = stop
        return found

    async def _seal_inline(
        self,
        extents: list[PlannedExtent],
        by_extent: dict[ExtentID, Content],
        prepared: Prepared,
    ) -> None:
        for extent in extents:
            content = by_extent[extent.extent_id]
            plain = await self._reader.read_layer(
                content.inode, content.layer, extent.file_offset,
                extent.file_offset + extent.length,
            )  # fmt: skip
            sealed = bytearray(extent.ciphertext_bytes)
            keys.encrypt_records(
                extent.content_key, extent.extent_id, 0, plain, True, memoryview(sealed)
            )
            prepared.operations.append(m.PutInline(extent.extent_id, bytes(sealed)))
            prepared.placements[extent.extent_id] = m.Placement(
                extent.extent_id, INLINE_SEGMENT, 0, len(sealed)
            )

    async def _upload(
        self,
        plan: PlannedSegment,
        by_extent: dict[ExtentID, Content],
        prepared: Prepared,
    ) -> None:
        async def read_plain(extent: PlannedExtent, offset: int, count: int) -> memoryview:
            content = by_extent[extent.extent_id]
            start = extent.file_offset + offset
            return await self._reader.read_layer(content.inode, content.layer, start, start + count)

        put = await self._client.upload_segment(
            self._volume.session.session_id,
            plan,
            read_plain,
            self._keep_clean if self._is_worth_keeping() else None,
        )
        prepared.operations.append(put)
        prepared.placements |= {item.extent_id: item for item in put.placements}

    def _is_worth_keeping(self) -> bool:
        """Whether to cache what is being sent: not a stream, which would push out the rest."""
        return self._volume.keeps_clean and len(self._volume.queue) <= 1

    async def _keep_clean(self, plan: PlannedSegment, data: memoryview) -> None:
        """Keep what is being uploaded in the clean cache: the log is about to let it go."""
        run = RUN_RECORDS * RECORD_BYTES
        for extent, offset in plan.extents:
            end = offset + extent.ciphertext_bytes
            runs = [
                (extent.extent_id, number, [data[start : min(start + run, end)]])
                for number, start in enumerate(range(offset, end, run))
            ]
            await self._volume.clean.put(runs)

    def _size_of(self, content: Content) -> int:
        """The file's size after this commit: alone as it was then, shared over what is there."""
        if self._volume.is_shared:
            return content.layer.size_over(content.inode.committed_size)
        return content.frozen.size

    def _update_operations(self, batch: Batch, contents: list[Content]) -> list[Update]:
        """One operation per touched inode: content with attributes, or attributes alone."""
        by_number = {content.inode.number: content for content in contents}
        updates: list[Update] = [
            (self._commit_content(content), content.inode, content) for content in contents
        ]
        others = {n: inode for n, inode in batch.touched.items() if n not in by_number}
        return updates + self._attribute_operations(batch, others)

    def _attribute_operations(self, batch: Batch, inodes: dict[int, Inode]) -> list[Update]:
        updates: list[Update] = []
        for number, inode in inodes.items():
            frozen = batch.frozen[number]
            if frozen.dead or inode.is_reaped:
                continue
            operation = building.set_attributes(self._volume, inode, frozen.attributes)
            updates.append((operation, inode, None))
        return updates

    def _commit_content(self, content: Content) -> m.CommitContent:
        """Raises Refused when the map has changed since the content was planned."""
        inode, size = content.inode, self._size_of(content)
        attributes = content.frozen.attributes
        if self._volume.is_shared:
            attributes = inode.attributes  # what others have set since is in it
        rows = _new_rows(content) if not content.is_outdated else []
        sealed = Sealed(
            inode.number, inode.generation, inode.kind, attributes,
            inode.content_version + 1, size, extentmap.map_root(rows),
        )  # fmt: skip
        operation = m.CommitContent(
            inode.number,
            inode.content_version,
            min(content.layer.cut, FILE_BYTES_MAX),
            size,
            sum(row.length for row in rows),
            (),
            # At version 0 the satellite has no rows; a conflict copy brings those it starts with.
            tuple(_added_rows(content) if inode.content_version else rows),
            attributes,
            inode.key.seal(self._client.bucket_id, sealed),
            inode.seal,
        )
        if content.is_outdated:
            raise Refused(operation, PreconditionFailed("its extent map has changed meanwhile"))
        return operation

    async def _apply(self, kind: int, covered: int, operations: list[m.Operation]) -> None:
        """Send one transaction; idempotent, so an unknown outcome is asked for again."""
        session = self._volume.session
        sequence = session.sequence + 1
        digest = blake3()
        for operation in operations:
            digest.update(pack(operation))
        chain = Hash(blake3(session.chain + digest.digest()).digest())
        flush = journal.FlushRecord(session.session_id, sequence, chain, covered)
        await self._note_in_log(kind, flush)
        request = m.ApplyRequest(
            self._client.api_key, session.session_id, sequence, chain, True, False,
            tuple(operations),
        )  # fmt: skip
        response = await self._send(request)
        for operation, result in zip(operations, response.results, strict=False):
            if result.code:
                raise Refused(operation, error_from_wire(result.code, result.text))
        session.sequence, session.chain = sequence, chain
        self._client.counters.satellite_transactions += 1
        done = journal.DoneRecord(session.session_id, sequence)
        with suppress(OSError):
            journal.append_message(self._volume.log, journal.DONE, done)

    async def _note_in_log(self, kind: int, flush: journal.FlushRecord) -> None:
        """Have the record on disk before its batch is sent.

        When the disk fails, what can still be read of it goes to the network all the same: a
        later mount sees from the sequence that this log is old, and does not replay it.
        """
        disk = self._volume.log
        if not disk.has_failed():
            try:
                journal.append_message(disk, kind, flush)
                await disk.sync()
            except OSError as error:
                if not disk.has_failed():
                    raise  # no space: nothing is lost, later there may be some
                log.error("the cache disk failed, sending what is staged: %s", error)

    async def _send(self, request: m.ApplyRequest) -> m.ApplyResponse:
        delay = RETRY_FIRST_S
        while True:
            try:
                return await self._client.call(m.APPLY, request)
            except Unavailable as error:
                # Sent or not? The same bytes again settle it: the satellite keeps the result.
                self.last_error = str(error)
                self._announce()
                await trio.sleep(delay)
                delay = min(2 * delay, RETRY_LAST_S)

    def _finish(self, batch: Batch, prepared: Prepared, updates: list[Update]) -> None:
        """Make the committed state the base, and let the log go. No checkpoint inside."""
        self._volume.events_seen += 1
        for operation, inode, content in updates:
            if content is None or not isinstance(operation, m.CommitContent):
                continue
            if inode.content_version != operation.expected_version or inode.rows is None:
                inode.is_stale = True
                continue  # the satellite's word of this commit, or a later one, came in before
            for extent in content.extents:
                inode.placements[extent.extent_id] = prepared.placements[extent.extent_id]
            inode.rows = _new_rows(content)
            inode.content_version += 1
            for later in (*self._volume.queue, self._volume.open_batch):
                if inode.number in later.losers:
                    later.losers[inode.number] = inode.content_version
            inode.committed_size = operation.size
            inode.allocated = operation.allocated
            inode.seal = operation.seal
            live = {row.extent_id for row in inode.rows}
            inode.placements = {k: v for k, v in inode.placements.items() if k in live}
        for number, layer in batch.layers.items():
            inode = batch.touched[number]
            if layer in inode.layers:
                inode.layers.remove(layer)
            if not inode.layers:
                inode.base = None
        self._adopt_seals(batch, updates)
        self._volume.log.trim(batch.last_sequence)

    def _adopt_seals(self, batch: Batch, updates: list[Update]) -> None:
        """Remember the seals the satellite has now."""
        updated = {inode.number for _, inode, _ in updates}
        for operation in batch.operations:
            if isinstance(operation, m.Create) and operation.inode.inode not in updated:
                made = self._volume.inodes.get(operation.inode.inode)
                if made is not None:
                    made.seal = operation.inode.seal
        for operation, inode, _ in updates:
            if isinstance(operation, m.SetAttributes):
                if operation.expected_seal and inode.seal != operation.expected_seal:
                    inode.is_stale = True  # taken over from the satellite meanwhile
                else:
                    inode.seal = operation.seal


def _must_be_prepared_anew(batch: Batch, refused: m.Operation) -> bool:
    """Whether what is on the nodes cannot be committed; else it stays there and is not sent again.

    That is so when its file is gone or empty now, or a segment was refused.
    """
    if batch.prepared is None or isinstance(refused, m.PutSegment | m.PutInline):
        return True
    return any(
        content.is_outdated
        or content.inode.is_reaped
        or _is_cut_later(content.inode, content.layer)
        for content in batch.prepared.contents
    )


def _is_cut_later(inode: Inode, layer: Layer) -> bool:
    """Whether nothing of this layer can be seen: a later one begins with an empty file.

    The record of that is older than the FLUSH record of this layer's batch, and so durable.
    """
    if layer not in inode.layers:
        return False
    return any(later.cut == 0 for later in inode.layers[inode.layers.index(layer) + 1 :])


def _added_rows(content: Content) -> list[Row]:
    return [
        Row(extent.file_offset, extent.length, extent.extent_id, 0, keys.CONTENT_KEY_VERSION)
        for extent in content.extents
    ]


def _new_rows(content: Content) -> list[Row]:
    assert content.inode.rows is not None
    rows = list(content.inode.rows)
    extentmap.apply_edits(rows, content.layer.cut, [], _added_rows(content))
    return rows

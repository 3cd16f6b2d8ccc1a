"""The clean cache: ciphertext runs of extents in slab files, indexed by diskcache.

Values are the network's own ciphertext: encrypted at rest for free, and authenticated whenever
they are used, so a damaged cache costs a download, never a wrong byte. Losing it all is harmless.
"""

import contextlib
import logging
import mmap
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diskcache
import trio

from network.files import open_direct
from network.ids import ExtentID
from network.limits import RECORD_BYTES
from network.runtime import Runtime

log = logging.getLogger(__name__)

RUN_RECORDS = 16
"""A run is up to 16 records: 1 MiB of plaintext."""
_BLOCK_BYTES = 4096
"""Direct writes start and end on this."""
_SLOT_BYTES = tuple(
    -(-records * RECORD_BYTES // _BLOCK_BYTES) * _BLOCK_BYTES for records in (1, 4, RUN_RECORDS)
)
_DIRECT_CLASS = len(_SLOT_BYTES) - 1
_MODE_BINARY = 2
RUNS_AT_ONCE = 8
"""Written in one call to a thread and indexed in one transaction."""
Run = tuple[ExtentID, int, list[memoryview]]
"""Extent, run number, the ciphertext in consecutive parts."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a value of `length` bytes lies: slot `number` of one slab file."""

    size_class: int
    number: int
    length: int

    @property
    def offset(self) -> int:
        """Byte offset in the slab file."""
        return self.number * _SLOT_BYTES[self.size_class]


class SlabDisk(diskcache.Disk):
    """diskcache's view of three sparse files of equal slots: its values are Slots.

    The bytes themselves are written before `set` and read after `get`, by the caller.
    """

    def __init__(self, directory: str, **settings: Any) -> None:
        super().__init__(directory, **settings)
        paths = [Path(directory) / f"slots-{size}.slab" for size in _SLOT_BYTES]
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._descriptors = [os.open(path, flags, 0o600) for path in paths]
        self._direct = open_direct(paths[_DIRECT_CLASS])
        self._used: list[set[int]] = [set() for _ in _SLOT_BYTES]
        self._free: list[list[int]] = [[] for _ in _SLOT_BYTES]
        self._pinned: Counter[tuple[int, int]] = Counter()
        self._load_used(Path(directory) / "cache.db")

    def _load_used(self, database: Path) -> None:
        if not database.exists():
            return
        connection = sqlite3.connect(database)
        with contextlib.suppress(sqlite3.Error):
            rows = connection.execute("SELECT filename FROM Cache WHERE filename IS NOT NULL")
            for (name,) in rows:
                slot = self._parse(name)
                self._used[slot.size_class].add(slot.number)
        connection.close()
        for size_class, used in enumerate(self._used):
            self._free[size_class] = sorted(set(range(max(used, default=-1) + 1)) - used)

    @staticmethod
    def _parse(name: str) -> Slot:
        _, size_class, number, length = name.split("-")
        return Slot(int(size_class), int(number), int(length))

    def allocate(self, length: int) -> Slot:
        """Claim a free slot that nobody reads."""
        size_class = next(i for i, size in enumerate(_SLOT_BYTES) if length <= size)
        free, used = self._free[size_class], self._used[size_class]
        number = len(used) + len(free)
        for position in range(len(free) - 1, -1, -1):
            if (size_class, free[position]) not in self._pinned:
                number = free.pop(position)
                break
        used.add(number)
        return Slot(size_class, number, length)

    def release(self, slot: Slot) -> None:
        """Give a slot back; diskcache may have done so already when `set` failed."""
        if slot.number in self._used[slot.size_class]:
            self._used[slot.size_class].remove(slot.number)
            self._free[slot.size_class].append(slot.number)

    def write(self, slot: Slot, data: bytes) -> None:
        """Write a value through the page cache; raises OSError."""
        os.pwrite(self._descriptors[slot.size_class], data, slot.offset)

    @property
    def writes_directly(self) -> bool:
        """Whether the file system lets values pass the page cache."""
        return self._direct is not None

    def write_direct(self, writes: list[tuple[Slot, memoryview]]) -> None:
        """Write aligned blocks past the page cache, for a thread; raises OSError."""
        assert self._direct is not None
        for slot, block in writes:
            os.pwrite(self._direct, block, slot.offset)

    def read(self, slot: Slot) -> bytes:
        """Read a value, for a thread; raises OSError."""
        return os.pread(self._descriptors[slot.size_class], slot.length, slot.offset)

    @contextlib.contextmanager
    def pinned(self, slot: Slot) -> Iterator[None]:
        """Keep a slot from being used again while it is read."""
        key = (slot.size_class, slot.number)
        self._pinned[key] += 1
        try:
            yield
        finally:
            self._pinned[key] -= 1
            if not self._pinned[key]:
                del self._pinned[key]

    def store(self, value: Any, read: bool, key: object = diskcache.UNKNOWN) -> Any:
        """Index a slot that has been written."""
        if not isinstance(value, Slot):
            return super().store(value, read, key)
        name = f"slot-{value.size_class}-{value.number}-{value.length}"
        return value.length, _MODE_BINARY, name, None

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        """The slot of an indexed value."""
        if mode != _MODE_BINARY or filename is None:
            return super().fetch(mode, filename, value, read)
        return self._parse(filename)

    def remove(self, file_path: str) -> None:
        """diskcache lets a value go."""
        self.release(self._parse(Path(file_path).name))

    def close(self) -> None:
        """Close the slab files."""
        for descriptor in (*self._descriptors, self._direct):
            if descriptor is not None:
                os.close(descriptor)


class CleanCache:
    """Runs of extents by (extent id, run number).

    The index is read and changed on the loop (SQLite in the page cache, tens of microseconds);
    bytes move in threads. Large runs pass the page cache: they are in memory already, as plaintext
    and in the kernel, and fresh pages cost more than the whole rest of a read.
    """

    def __init__(self, directory: Path, size_bytes: int, runtime: Runtime) -> None:
        self._runtime = runtime
        self._cache = self._open(directory, size_bytes)
        disk = self._cache.disk
        assert isinstance(disk, SlabDisk)
        self._disk = disk
        self._blocks = [
            memoryview(mmap.mmap(-1, _SLOT_BYTES[_DIRECT_CLASS])) for _ in range(RUNS_AT_ONCE)
        ]
        self.is_putting = False
        """Whether a `put` is on its way: another would be skipped."""
        self.hits = 0
        self.skipped = 0
        """Runs not kept: a reader that is faster than the disk goes on at its own speed."""

    @staticmethod
    def _open(directory: Path, size_bytes: int) -> diskcache.Cache:
        settings: dict[str, Any] = {
            "size_limit": size_bytes,
            "eviction_policy": "least-recently-used",
            "cull_limit": 32,
            "sqlite_synchronous": 0,
            "statistics": 0,
        }
        try:
            return diskcache.Cache(str(directory), disk=SlabDisk, **settings)
        except sqlite3.Error as error:
            log.warning("clean cache was damaged and is emptied: %s", error)
            for path in directory.iterdir():
                path.unlink()
            return diskcache.Cache(str(directory), disk=SlabDisk, **settings)

    @staticmethod
    def _name(extent_id: ExtentID, run: int) -> str:
        return f"{extent_id.hex()}:{run}"

    async def get(self, extent_id: ExtentID, run: int) -> bytes | None:
        """A run's ciphertext, not yet authenticated; None if absent or unreadable."""
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            slot = self._cache.get(self._name(extent_id, run))
            if not isinstance(slot, Slot):
                return None
            with self._disk.pinned(slot):
                data = await self._runtime.offload(self._disk.read, slot)
        except (OSError, sqlite3.Error, ValueError) as error:
            log.warning("clean cache read failed: %s", error)
            return None
        self.hits += 1
        return data

    async def put(self, runs: list[Run]) -> None:
        """Keep runs if the disk is not behind; a failing disk only costs speed.

        If cancelled, some are kept.
        """
        if self.is_putting:
            self.skipped += len(runs)
            return
        self.is_putting = True
        try:
            for batch in _batches(runs):
                await trio.lowlevel.checkpoint()
                await self._put(batch)
        except (OSError, sqlite3.Error, diskcache.Timeout) as error:
            log.warning("clean cache write failed: %s", error)
        finally:
            self.is_putting = False

    async def _put(self, batch: list[Run]) -> None:
        slots = [self._disk.allocate(sum(map(len, parts))) for _, _, parts in batch]
        try:
            if slots[0].size_class == _DIRECT_CLASS and self._disk.writes_directly:
                await self._write_direct(slots, batch)
            else:
                for slot, (_, _, parts) in zip(slots, batch, strict=True):
                    self._disk.write(slot, b"".join(parts))
            with self._cache.transact():
                for slot, (extent_id, run, _) in zip(slots, batch, strict=True):
                    self._cache.set(self._name(extent_id, run), slot)
        except BaseException:
            for slot in slots:
                self._disk.release(slot)
            raise

    async def _write_direct(self, slots: list[Slot], batch: list[Run]) -> None:
        writes: list[tuple[Slot, memoryview]] = []
        for slot, (_, _, parts), block in zip(slots, batch, self._blocks, strict=False):
            position = 0
            for part in parts:
                block[position : position + len(part)] = part
                position += len(part)
            writes.append((slot, block[: -(-position // _BLOCK_BYTES) * _BLOCK_BYTES]))
        # Shielded: the thread would go on with slots and blocks that others use.
        with trio.CancelScope(shield=True):
            await self._runtime.offload(self._disk.write_direct, writes)

    async def drop(self, extent_id: ExtentID, run: int) -> None:
        """Forget a run that failed its authentication."""
        await trio.lowlevel.checkpoint()
        with contextlib.suppress(sqlite3.Error, OSError):
            self._cache.delete(self._name(extent_id, run))

    def volume(self) -> int:
        """Bytes kept, as diskcache counts them."""
        return self._cache.volume()

    def close(self) -> None:
        """Close the index and the slab files."""
        self._cache.close()
        self._disk.close()


def _batches(runs: list[Run]) -> list[list[Run]]:
    """Consecutive runs that go to disk together: all large, or all not, RUNS_AT_ONCE at most."""
    batches: list[list[Run]] = []
    limit, was_large = _SLOT_BYTES[_DIRECT_CLASS - 1], False
    for item in runs:
        is_large = sum(map(len, item[2])) > limit
        if batches and is_large == was_large and len(batches[-1]) < RUNS_AT_ONCE:
            batches[-1].append(item)
        else:
            batches.append([item])
        was_large = is_large
    return batches

"""The clean cache: ciphertext runs of extents, by diskcache, in slab files.

Values are the network's own ciphertext: encrypted at rest for free, and authenticated whenever
they are used, so a damaged cache costs a download, never a wrong byte. Losing it all is harmless.
"""

import contextlib
import logging
import os
import sqlite3
from pathlib import Path
from typing import Any

import diskcache
import trio

from network.ids import ExtentID
from network.limits import RECORD_BYTES
from network.runtime import Runtime

log = logging.getLogger(__name__)

RUN_RECORDS = 16
"""A run is up to 16 records: 1 MiB of plaintext."""
_SLOT_BYTES = (RECORD_BYTES, 4 * RECORD_BYTES, RUN_RECORDS * RECORD_BYTES)
_MODE_BINARY = 2


class SlabDisk(diskcache.Disk):
    """Keeps values in three sparse files of equal slots, instead of a file per value."""

    def __init__(self, directory: str, **settings: Any) -> None:
        super().__init__(directory, **settings)
        self._descriptors = [
            os.open(
                Path(directory) / f"slots-{size}.slab", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
            for size in _SLOT_BYTES
        ]
        self._used: list[set[int]] = [set() for _ in _SLOT_BYTES]
        self._free: list[list[int]] = [[] for _ in _SLOT_BYTES]
        self._load_used(Path(directory) / "cache.db")

    def _load_used(self, database: Path) -> None:
        if not database.exists():
            return
        connection = sqlite3.connect(database)
        with contextlib.suppress(sqlite3.Error):
            rows = connection.execute("SELECT filename FROM Cache WHERE filename IS NOT NULL")
            for (name,) in rows:
                size_class, slot = self._parse(name)
                self._used[size_class].add(slot)
        connection.close()
        for size_class, used in enumerate(self._used):
            self._free[size_class] = sorted(set(range(max(used, default=-1) + 1)) - used)

    @staticmethod
    def _parse(name: str) -> tuple[int, int]:
        _, size_class, slot, _ = name.split("-")
        return int(size_class), int(slot)

    def store(self, value: Any, read: bool, key: object = diskcache.UNKNOWN) -> Any:
        """Write a value of bytes into a free slot."""
        if type(value) not in (bytes, memoryview, bytearray):
            return super().store(value, read, key)
        size_class = next(i for i, size in enumerate(_SLOT_BYTES) if len(value) <= size)
        free, used = self._free[size_class], self._used[size_class]
        slot = free.pop() if free else len(used)
        used.add(slot)
        os.pwrite(self._descriptors[size_class], value, slot * _SLOT_BYTES[size_class])
        return len(value), _MODE_BINARY, f"slot-{size_class}-{slot}-{len(value)}", None

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        """Read a value back."""
        if mode != _MODE_BINARY or filename is None:
            return super().fetch(mode, filename, value, read)
        _, size_class, slot, size = filename.split("-")
        offset = int(slot) * _SLOT_BYTES[int(size_class)]
        return os.pread(self._descriptors[int(size_class)], int(size), offset)

    def remove(self, file_path: str) -> None:
        """Give a slot back."""
        size_class, slot = self._parse(file_path)
        self._used[size_class].discard(slot)
        self._free[size_class].append(slot)


class CleanCache:
    """Runs of extents by (extent id, run number)."""

    def __init__(self, directory: Path, size_bytes: int, runtime: Runtime) -> None:
        self._runtime = runtime
        self._lock = trio.Lock()
        self._cache = self._open(directory, size_bytes)
        self.hits = 0
        self.misses = 0

    @staticmethod
    def _open(directory: Path, size_bytes: int) -> diskcache.Cache:
        settings: dict[str, Any] = {
            "size_limit": size_bytes,
            "eviction_policy": "least-recently-stored",
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
        async with self._lock:
            data = await self._runtime.offload(self._get, self._name(extent_id, run))
        if data is None:
            self.misses += 1
        else:
            self.hits += 1
        return data

    def _get(self, name: str) -> bytes | None:
        try:
            found = self._cache.get(name)
        except (OSError, sqlite3.Error, ValueError) as error:
            log.warning("clean cache read failed: %s", error)
            return None
        return found if isinstance(found, bytes) else None

    async def put(self, runs: list[tuple[ExtentID, int, list[memoryview]]]) -> None:
        """Keep runs; a failing disk only costs speed.

        Page-cache writes on the loop, one run at a time: a thread would have to win the
        interpreter lock back after each of diskcache's statements (docs/decisions/0006).
        """
        for extent_id, run, parts in runs:
            await trio.lowlevel.checkpoint()
            try:
                self._cache.set(self._name(extent_id, run), b"".join(parts))
            except (OSError, sqlite3.Error) as error:
                log.warning("clean cache write failed: %s", error)
                return

    async def drop(self, extent_id: ExtentID, run: int) -> None:
        """Forget a run that failed its authentication."""
        await trio.lowlevel.checkpoint()
        with contextlib.suppress(sqlite3.Error, OSError):
            self._cache.delete(self._name(extent_id, run))

    def volume(self) -> int:
        """Bytes kept, as diskcache counts them."""
        return self._cache.volume()

    def close(self) -> None:
        """Close the index."""
        self._cache.close()

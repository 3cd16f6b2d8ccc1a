"""The write-back log: encrypted records in preallocated slab files (docs/specs/log.md).

One order for staged data and namespace operations. Nothing synced is overwritten: a slab is
deleted whole once everything in it is committed. Each mount starts a fresh slab, whose key comes
from a random salt, so a record number lost in a crash never meets the same key again.
"""

import errno
import logging
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import trio
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from dcsfs import keys
from network.errors import IntegrityError
from network.files import sync_directory, write_fully
from network.runtime import Runtime
from network.units import MiB

log = logging.getLogger(__name__)

SLAB_BYTES = 64 * MiB
RECORD_PAYLOAD_BYTES_MAX = 2 * MiB
_HEADER = struct.Struct(">4sB3xQQ32s")
_HEADER_MAGIC = b"DCSL"
_HEADER_BYTES = _HEADER.size + 32
_PREFIX = struct.Struct(">4sB3xIQQ")
_PREFIX_MAGIC = b"DCSR"
_TAG_BYTES = 16
_RESERVE_MARGIN_BYTES = 256 * 1024


class RecordTrimmed(Exception):
    """The record has been committed and its slab deleted since its position was looked up."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a record lies; enough to read it again."""

    slab: int
    offset: int
    sequence: int
    payload_bytes: int


@dataclass(slots=True)
class _Slab:
    number: int
    descriptor: int
    path: Path
    cipher: AESGCM
    salt: bytes
    first_sequence: int
    last_sequence: int


class WriteLog:
    """Append-only; appends are inline (page cache), syncs share one fdatasync in a thread."""

    def __init__(
        self, directory: Path, key: bytes, runtime: Runtime, *, is_durable: bool = True
    ) -> None:
        self._directory = directory
        self._key = key
        self._runtime = runtime
        self._is_durable = is_durable
        self._slabs: dict[int, _Slab] = {}
        self._sequence = 0
        self._end = 0
        self._current: _Slab | None = None
        self._spare: _Slab | None = None
        self._unsynced: set[int] = set()
        self._new_entries = False
        self._synced_sequence = 0
        self._sync_running: trio.Event | None = None
        self.sync_count = 0
        self.failure: OSError | None = None
        """Set once the disk refused a sync or a write: nothing more can be promised."""
        directory.mkdir(mode=0o700, exist_ok=True)
        for path in sorted(directory.glob("*.slab")):
            self._open_existing(path)

    @property
    def last_sequence(self) -> int:
        """Number of the newest record."""
        return self._sequence

    def has_failed(self) -> bool:
        """Whether the disk has refused a sync or a write."""
        return self.failure is not None

    @property
    def disk_bytes(self) -> int:
        """Bytes the slabs take on disk."""
        return len(self._slabs) * SLAB_BYTES

    @property
    def used_bytes(self) -> int:
        """Bytes of the slabs that hold records, committed or not."""
        current = SLAB_BYTES - self._end if self._current is not None else 0
        return self.disk_bytes - current - (SLAB_BYTES if self._spare is not None else 0)

    def _cipher(self, salt: bytes) -> AESGCM:
        return AESGCM(keys.derive(self._key, b"log slab " + salt))

    def _open_existing(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        header = os.pread(descriptor, _HEADER_BYTES, 0)
        body, check = header[: _HEADER.size], header[_HEADER.size :]
        expected = blake3(body, key=keys.derive(self._key, b"log header")).digest()
        if len(check) != 32 or check != expected:
            os.close(descriptor)
            if any(header):
                raise IntegrityError(
                    f"log slab {path} does not open with this grant: it belongs to another "
                    "bucket or is damaged (it is left as it is)"
                )
            os.unlink(path)  # preallocated, then the machine stopped: nothing was ever in it
            return
        _, version, number, first, salt = _HEADER.unpack(body)
        if version != 1:
            raise IntegrityError(f"log slab {path} is of version {version}")
        slab = _Slab(number, descriptor, path, self._cipher(salt), salt, first, first - 1)
        self._slabs[number] = slab

    def has_room(self, count: int, budget: int) -> bool:
        """Whether `count` payload bytes fit without the slabs passing `budget` bytes on disk."""
        left = SLAB_BYTES - self._end if self._current is not None else 0
        if left >= count + _RESERVE_MARGIN_BYTES or self._spare is not None:
            return True
        return self.disk_bytes + SLAB_BYTES <= budget

    def reserve(self, count: int) -> None:
        """Have room for `count` payload bytes and a few small records; raises OSError if not.

        Appends of that size right after this, without a checkpoint between, cannot fail for
        want of space.
        """
        left = SLAB_BYTES - self._end if self._current is not None else 0
        if left < count + _RESERVE_MARGIN_BYTES and self._spare is None:
            self._spare = self._make_slab()

    def _start_slab(self) -> _Slab:
        slab, self._spare = self._spare or self._make_slab(), None
        header = _HEADER.pack(_HEADER_MAGIC, 1, slab.number, self._sequence + 1, slab.salt)
        check = blake3(header, key=keys.derive(self._key, b"log header")).digest()
        write_fully(slab.descriptor, header + check, 0)
        slab.first_sequence, slab.last_sequence = self._sequence + 1, self._sequence
        self._current, self._end = slab, _HEADER_BYTES
        self._new_entries = True
        self._unsynced.add(slab.number)
        return slab

    def _make_slab(self) -> _Slab:
        number = max(self._slabs, default=0) + 1
        path = self._directory / f"{number:08d}.slab"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, SLAB_BYTES)
        except OSError:
            os.close(descriptor)
            os.unlink(path)
            raise
        salt = self._runtime.random_bytes(32)
        slab = _Slab(number, descriptor, path, self._cipher(salt), salt, 0, 0)
        self._slabs[number] = slab
        return slab

    def append(self, kind: int, *parts: bytes | memoryview) -> Position:
        """Write a record to the page cache; raises OSError (ENOSPC among them), nothing changed."""
        size = sum(len(part) for part in parts)
        assert size <= RECORD_PAYLOAD_BYTES_MAX
        total = _PREFIX.size + size + _TAG_BYTES
        slab = self._current
        if slab is None or self._end + total > SLAB_BYTES:
            slab = self._start_slab()
        sequence = self._sequence + 1
        prefix = _PREFIX.pack(_PREFIX_MAGIC, kind, size, slab.number, sequence)
        record = bytearray(total)
        record[: _PREFIX.size] = prefix
        payload = parts[0] if len(parts) == 1 else b"".join(parts)
        slab.cipher.encrypt_into(
            sequence.to_bytes(12, "big"), payload, prefix, memoryview(record)[_PREFIX.size :]
        )
        try:
            write_fully(slab.descriptor, record, self._end)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                self.failure = error
            raise
        position = Position(slab.number, self._end, sequence, size)
        self._end += total
        self._sequence = slab.last_sequence = sequence
        self._unsynced.add(slab.number)
        return position

    def read(self, position: Position) -> memoryview:
        """A record's payload; raises RecordTrimmed, or IntegrityError if the disk changed it."""
        slab = self._slabs.get(position.slab)
        if slab is None:
            raise RecordTrimmed
        found = self._read_at(slab, position.offset, position.sequence)
        if found is None:
            raise IntegrityError(f"log record {position.sequence} is damaged")
        return found[1]

    def _read_at(self, slab: _Slab, offset: int, sequence: int) -> tuple[int, memoryview] | None:
        prefix = os.pread(slab.descriptor, _PREFIX.size, offset)
        if len(prefix) < _PREFIX.size:
            return None
        magic, kind, size, number, have = _PREFIX.unpack(prefix)
        if magic != _PREFIX_MAGIC or number != slab.number or have != sequence:
            return None
        if size > RECORD_PAYLOAD_BYTES_MAX:
            return None
        data = os.pread(slab.descriptor, size + _TAG_BYTES, offset + _PREFIX.size)
        if len(data) < size + _TAG_BYTES:
            return None
        plain = memoryview(bytearray(size))
        try:
            slab.cipher.decrypt_into(sequence.to_bytes(12, "big"), data, prefix, plain)
        except InvalidTag:
            return None
        return kind, plain

    def replay(self) -> Iterator[tuple[Position, int, memoryview]]:
        """Every intact record in order. What follows a torn record in its slab was never synced.

        Call once, before the first append.
        """
        assert self._current is None
        for number in sorted(self._slabs):
            slab = self._slabs[number]
            offset, sequence = _HEADER_BYTES, slab.first_sequence
            while offset + _PREFIX.size <= SLAB_BYTES:
                found = self._read_at(slab, offset, sequence)
                if found is None:
                    break
                kind, payload = found
                yield Position(number, offset, sequence, len(payload)), kind, payload
                slab.last_sequence = sequence
                offset += _PREFIX.size + len(payload) + _TAG_BYTES
                sequence += 1
            self._sequence = max(self._sequence, slab.last_sequence)

    async def sync(self) -> None:
        """Return once every record appended before this call is on disk. Raises OSError.

        Concurrent callers share one fdatasync. If cancelled, the sync goes on.
        """
        wanted = self._sequence
        if not self._is_durable:
            return
        while self._synced_sequence < wanted:
            if self.failure is not None:
                raise self.failure
            if self._sync_running is not None:
                await self._sync_running.wait()
                continue
            done = self._sync_running = trio.Event()
            covered, files = self._sequence, self._unsynced
            new_entries, self._new_entries = self._new_entries, False
            self._unsynced = set()
            descriptors = [self._slabs[n].descriptor for n in files if n in self._slabs]
            try:
                with trio.CancelScope(shield=True):
                    await self._runtime.offload(self._sync_files, descriptors, new_entries)
            except OSError as error:
                # After a failed fsync the kernel may have dropped the pages: trying again
                # would succeed without the data.
                self.failure = error
                raise
            finally:
                self._sync_running = None
                done.set()
            self._synced_sequence = max(self._synced_sequence, covered)

    def _sync_files(self, descriptors: list[int], new_entries: bool) -> None:
        for descriptor in descriptors:
            os.fdatasync(descriptor)
        if new_entries:
            sync_directory(self._directory)
        self.sync_count += 1

    def trim(self, sequence: int) -> None:
        """Delete slabs whose records all have numbers up to `sequence`; never the current one.

        A slab that cannot be deleted is forgotten: replay skips what is committed.
        """
        for slab in list(self._slabs.values()):
            is_in_use = slab is self._current or slab is self._spare
            if not is_in_use and slab.last_sequence <= sequence:
                self._delete(slab)

    def _delete(self, slab: _Slab) -> None:
        # Out of the table first: a descriptor that is closed twice may be somebody else's.
        del self._slabs[slab.number]
        self._unsynced.discard(slab.number)
        try:
            os.unlink(slab.path)
        except OSError as error:
            log.warning("log slab %s was not deleted: %s", slab.path, error)
        finally:
            os.close(slab.descriptor)

    def discard(self) -> None:
        """Delete all slabs: everything in them is committed and the session is closed."""
        self._current = self._spare = None
        for slab in list(self._slabs.values()):
            self._delete(slab)

    def close(self) -> None:
        """Close all files."""
        for slab in self._slabs.values():
            os.close(slab.descriptor)
        self._slabs.clear()

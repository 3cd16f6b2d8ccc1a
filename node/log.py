"""The append-only piece log: regions in numbered files (docs/specs/piece-store.md).

A region is reserved whole when an upload opens, so uploads run side by side and the files stay
walkable whatever is torn: prefix (32 bytes: magic, kind, body and footer sizes, checksum), body
(the piece's shares), footer (the packed record, then its BLAKE3). A region without a good footer
is dead. An acknowledged region's fdatasync covers every prefix before it in its file.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from network.files import punch_hole, sync_directory, write_fully

LOG_FILE_BYTES_MAX = 256 * 1024 * 1024
_PREFIX = struct.Struct(">4sB3xQI12s")
_MAGIC = b"DCSP"
_DIGEST_BYTES = 32

PIECE = 1
DELETION = 2


@dataclass(frozen=True, slots=True)
class Region:
    """A reserved stretch of one log file."""

    file: int
    offset: int
    kind: int
    body_bytes: int
    footer_bytes: int
    """Room for the footer without its digest; the record in it may be shorter."""

    @property
    def body_offset(self) -> int:
        """File offset of the body."""
        return self.offset + _PREFIX.size

    @property
    def end(self) -> int:
        """File offset just past the region."""
        return self.body_offset + self.body_bytes + self.footer_bytes + 4 + _DIGEST_BYTES


def _prefix(kind: int, body_bytes: int, footer_bytes: int) -> bytes:
    head = _PREFIX.pack(_MAGIC, kind, body_bytes, footer_bytes, bytes(12))[:-12]
    return head + blake3(head).digest(length=12)


class PieceLog:
    """The log files of one node; blocking calls, one caller at a time per region."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        self._directory = directory
        self._files: dict[int, int] = {}
        for path in sorted(directory.glob("*.log")):
            self._files[int(path.stem)] = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._current = max(self._files, default=0)
        if not self._files:
            self._open_new(0)
        self._end = os.fstat(self._files[self._current]).st_size

    def _open_new(self, number: int) -> None:
        path = self._directory / f"{number:08d}.log"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._files[number] = os.open(path, flags, 0o600)
        sync_directory(self._directory)
        self._current, self._end = number, 0

    def reserve(self, kind: int, body_bytes: int, footer_bytes: int) -> Region:
        """Claim room for a region and write its prefix; raises OSError."""
        if self._end > LOG_FILE_BYTES_MAX:
            os.fdatasync(self._files[self._current])
            self._open_new(self._current + 1)
        region = Region(self._current, self._end, kind, body_bytes, footer_bytes)
        write_fully(
            self._files[region.file], _prefix(kind, body_bytes, footer_bytes), region.offset
        )
        self._end = region.end
        return region

    def write_body(self, region: Region, position: int, data: memoryview) -> None:
        """Write part of the body; raises OSError."""
        assert position + len(data) <= region.body_bytes
        write_fully(self._files[region.file], data, region.body_offset + position)

    def finish(self, region: Region, record: bytes) -> None:
        """Write the footer; the region counts once `sync` has covered it."""
        assert len(record) <= region.footer_bytes
        footer = len(record).to_bytes(4, "big") + record
        padded = footer.ljust(4 + region.footer_bytes, b"\0")
        data = padded + blake3(padded).digest()
        write_fully(self._files[region.file], data, region.body_offset + region.body_bytes)

    def discard(self, region: Region) -> None:
        """Give the body of a dead region back to the disk."""
        punch_hole(self._files[region.file], region.body_offset, region.body_bytes)

    def sync(self, files: set[int]) -> None:
        """fdatasync the files named."""
        for number in files:
            os.fdatasync(self._files[number])

    def forget_pages(self, region: Region) -> None:
        """Give a synced region's page cache back: its pages serve the next writes, still warm."""
        descriptor = self._files[region.file]
        os.posix_fadvise(descriptor, region.body_offset, region.body_bytes, os.POSIX_FADV_DONTNEED)

    def read_into(self, file: int, offset: int, target: memoryview) -> int:
        """Fill `target` from a file; returns the bytes read, fewer at the end of the file."""
        return os.preadv(self._files[file], [target], offset)

    def read_cached(self, file: int, offset: int, target: memoryview) -> int:
        """As `read_into`, but only what the page cache has: never waits for the disk."""
        try:
            return os.preadv(self._files[file], [target], offset, os.RWF_NOWAIT)
        except OSError:  # nothing cached, or a file system that cannot tell
            return 0

    def read(self, file: int, offset: int, count: int) -> bytes:
        """Read raw bytes; shorter at the end of the file."""
        return os.pread(self._files[file], count, offset)

    def position(self) -> tuple[int, int]:
        """(file, offset) where the next region will start."""
        return self._current, self._end

    def scan(self, file: int, offset: int) -> Iterator[tuple[Region, bytes | None]]:
        """Walk regions from a position on, yielding each with its record, None if dead.

        A torn tail of the last file is cut off.
        """
        for number in sorted(self._files):
            if number < file:
                continue
            position = offset if number == file else 0
            size = os.fstat(self._files[number]).st_size
            while position < size:
                region = self._region_at(number, position)
                if region is None:
                    if number == self._current:
                        os.ftruncate(self._files[number], position)
                        self._end = position
                    break
                yield region, self._record_of(region)
                position = region.end
            if number == self._current:
                self._end = max(position, 0)

    def _region_at(self, file: int, offset: int) -> Region | None:
        data = self.read(file, offset, _PREFIX.size)
        if len(data) < _PREFIX.size:
            return None
        magic, kind, body_bytes, footer_bytes, _ = _PREFIX.unpack(data)
        if magic != _MAGIC or data != _prefix(kind, body_bytes, footer_bytes):
            return None
        return Region(file, offset, kind, body_bytes, footer_bytes)

    def _record_of(self, region: Region) -> bytes | None:
        offset = region.body_offset + region.body_bytes
        size = 4 + region.footer_bytes
        data = self.read(region.file, offset, size + _DIGEST_BYTES)
        padded, digest = data[:size], data[size:]
        if len(digest) != _DIGEST_BYTES or blake3(padded).digest() != digest:
            return None
        length = int.from_bytes(padded[:4], "big")
        return padded[4 : 4 + length] if length <= region.footer_bytes else None

    def close(self) -> None:
        """Close all files without syncing."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

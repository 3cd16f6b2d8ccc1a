"""Lay extents out in segments (docs/specs/segment.md, "Packing"). Pure.

Extents of a full record or more come first and start on a share boundary, so that an aligned
64 KiB is one share; small extents fill the gaps behind them, then follow. The segment ends with
an encrypted directory, so that a key holder can rebuild maps from segments alone.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from dcsfs import keys
from network.errors import IntegrityError
from network.ids import ExtentID, SegmentID
from network.limits import RECORD_BYTES, RECORD_PLAINTEXT_BYTES, TAG_BYTES

_ENTRY = struct.Struct(">16sQQQQQI")
_TRAILER = struct.Struct(">I4s")
_MAGIC = b"DCSD"
_HEAD = struct.Struct(">BQI")
EXTENTS_PER_SEGMENT_MAX = 16384


@dataclass(frozen=True, slots=True)
class PlannedExtent:
    """A run of one file's bytes that will be sealed as one extent."""

    extent_id: ExtentID
    inode: int
    generation: int
    file_offset: int
    length: int
    content_key: bytes

    @property
    def ciphertext_bytes(self) -> int:
        """Its length in the segment."""
        return keys.ciphertext_bytes(self.length)


@dataclass(frozen=True, slots=True)
class PlannedSegment:
    """Extents with their offsets, and the segment's total size with its directory."""

    extents: tuple[tuple[PlannedExtent, int], ...]
    size: int


def directory_bytes(count: int) -> int:
    """Room of a directory of `count` extents with its trailer."""
    return _HEAD.size + count * _ENTRY.size + TAG_BYTES + _TRAILER.size


def pack_extents(extents: Sequence[PlannedExtent], segment_bytes_max: int) -> list[PlannedSegment]:
    """Distribute extents over as few segments as first-fit gives, each within its limit."""
    large = [item for item in extents if item.length >= RECORD_PLAINTEXT_BYTES]
    small = [item for item in extents if item.length < RECORD_PLAINTEXT_BYTES]
    segments: list[PlannedSegment] = []
    while large or small:
        placed: list[tuple[PlannedExtent, int]] = []
        gaps: list[tuple[int, int]] = []
        end = 0
        while large and _fits(_aligned(end), large[0], len(placed), segment_bytes_max):
            start = _aligned(end)
            if start > end:
                gaps.append((end, start))
            placed.append((large[0], start))
            end = start + large.pop(0).ciphertext_bytes
        small = _fill_gaps(small, gaps, placed, end, segment_bytes_max)
        while small and _fits(end, small[0], len(placed), segment_bytes_max):
            placed.append((small[0], end))
            end += small.pop(0).ciphertext_bytes
        assert placed, "an extent is larger than a segment"
        segments.append(PlannedSegment(tuple(placed), end + directory_bytes(len(placed))))
    return segments


def _aligned(offset: int) -> int:
    return -(-offset // RECORD_BYTES) * RECORD_BYTES


def _fits(offset: int, extent: PlannedExtent, count: int, limit: int) -> bool:
    if count >= EXTENTS_PER_SEGMENT_MAX:
        return False
    return offset + extent.ciphertext_bytes + directory_bytes(count + 1) <= limit


def _fill_gaps(
    small: list[PlannedExtent],
    gaps: list[tuple[int, int]],
    placed: list[tuple[PlannedExtent, int]],
    end: int,
    limit: int,
) -> list[PlannedExtent]:
    """First fit of small extents into gaps; returns those that found none."""
    rest = []
    for extent in small:
        for i, (start, stop) in enumerate(gaps):
            room = end + directory_bytes(len(placed) + 1) <= limit
            if room and stop - start >= extent.ciphertext_bytes:
                placed.append((extent, start))
                gaps[i] = (start + extent.ciphertext_bytes, stop)
                break
        else:
            rest.append(extent)
    return rest


def directory_key(root_key: bytes, segment_id: SegmentID) -> bytes:
    """Key of one segment's directory, from the key of the tree's root."""
    return keys.derive(root_key, b"segment directory " + segment_id)


def encode_directory(
    root_key: bytes, root_inode: int, segment_id: SegmentID, segment: PlannedSegment
) -> bytes:
    """The encrypted directory and its plain trailer (length, magic)."""
    body = _HEAD.pack(1, root_inode, len(segment.extents)) + b"".join(
        _ENTRY.pack(
            item.extent_id, offset, item.ciphertext_bytes, item.inode, item.generation,
            item.file_offset, keys.CONTENT_KEY_VERSION,
        )
        for item, offset in segment.extents
    )  # fmt: skip
    sealed = AESGCM(directory_key(root_key, segment_id)).encrypt(bytes(12), body, segment_id)
    return sealed + _TRAILER.pack(len(sealed), _MAGIC)


@dataclass(frozen=True, slots=True)
class DirectoryEntry:
    """One extent as a segment's directory names it."""

    extent_id: ExtentID
    offset: int
    ciphertext_bytes: int
    inode: int
    generation: int
    file_offset: int
    key_version: int


def decode_directory(root_key: bytes, segment_id: SegmentID, tail: bytes) -> list[DirectoryEntry]:
    """Read a directory from a segment's last bytes; raises IntegrityError."""
    if len(tail) < _TRAILER.size:
        raise IntegrityError("segment is too short for a directory")
    length, magic = _TRAILER.unpack(tail[-_TRAILER.size :])
    sealed = tail[-_TRAILER.size - length : -_TRAILER.size]
    if magic != _MAGIC or len(sealed) != length or length < TAG_BYTES:
        raise IntegrityError("segment has no directory")
    try:
        body = AESGCM(directory_key(root_key, segment_id)).decrypt(bytes(12), sealed, segment_id)
    except InvalidTag as error:
        raise IntegrityError("segment directory does not open with this key") from error
    version, _, count = _HEAD.unpack_from(body)
    if version != 1 or len(body) != _HEAD.size + count * _ENTRY.size:
        raise IntegrityError("segment directory has an unknown version")
    return [
        DirectoryEntry(ExtentID(values[0]), *values[1:])
        for values in _ENTRY.iter_unpack(body[_HEAD.size :])
    ]

"""A file's extent map: which bytes of which extents hold which bytes of the file.

Client and satellite apply the same edits with this module, so that the client's seal over the map
root holds at both ends. Rows are sorted, never overlap, and never cross a MAP_WINDOW_BYTES border;
what no row covers is a hole (docs/specs/metadata.md, "Extent map").
"""

import struct
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from network import merkle
from network.errors import InvalidArgument
from network.ids import ExtentID, Hash
from network.limits import FILE_BYTES_MAX, MAP_WINDOW_BYTES

_WINDOW_CONTEXT = "dcsfs 2026 v1 map window"
_ROOT_CONTEXT = "dcsfs 2026 v1 map root"
_ROW = struct.Struct(">QQ16sQI")
_WINDOW = struct.Struct(">Q32s")


@dataclass(frozen=True, slots=True)
class Row:
    """`length` bytes of the file at `file_offset` are bytes of one extent."""

    file_offset: int
    length: int
    extent_id: ExtentID
    extent_offset: int
    """Where the run begins inside the extent's plaintext."""
    key_version: int

    @property
    def end(self) -> int:
        """File offset just past the run."""
        return self.file_offset + self.length

    def clip(self, start: int, end: int) -> "Row":
        """The part inside [start, end), which must overlap the row."""
        low, high = max(self.file_offset, start), min(self.end, end)
        assert low < high
        return replace(
            self,
            file_offset=low,
            length=high - low,
            extent_offset=self.extent_offset + low - self.file_offset,
        )


def check_rows(rows: Sequence[Row]) -> None:
    """Raise InvalidArgument unless rows are sorted, disjoint, non-empty and inside windows."""
    position = 0
    for row in rows:
        if row.length < 1 or row.file_offset < position or row.end > FILE_BYTES_MAX:
            raise InvalidArgument(f"extent row at {row.file_offset} overlaps or is empty")
        if row.file_offset // MAP_WINDOW_BYTES != (row.end - 1) // MAP_WINDOW_BYTES:
            raise InvalidArgument(f"extent row at {row.file_offset} crosses a window")
        position = row.end


def overlapping(rows: Sequence[Row], start: int, end: int) -> tuple[int, int]:
    """Index range [first, last) of the rows that overlap [start, end)."""
    first = bisect_right(rows, start, key=lambda row: row.end)
    last = first
    while last < len(rows) and rows[last].file_offset < end:
        last += 1
    return first, last


def clear(rows: list[Row], start: int, end: int) -> None:
    """Turn [start, end) into a hole, in place, cutting rows that stick out."""
    if start >= end:
        return
    first, last = overlapping(rows, start, end)
    kept = []
    for row in rows[first:last]:
        if row.file_offset < start:
            kept.append(row.clip(row.file_offset, start))
        if row.end > end:
            kept.append(row.clip(end, row.end))
    rows[first:last] = kept


def insert(rows: list[Row], row: Row) -> None:
    """Put a row in place of whatever its range held."""
    clear(rows, row.file_offset, row.end)
    first, _ = overlapping(rows, row.file_offset, row.end)
    rows.insert(first, row)


def apply_edits(
    rows: list[Row], size: int, cleared: Iterable[tuple[int, int]], added: Iterable[Row]
) -> None:
    """One commit's change to a map, in place: cut at `size`, clear ranges, add rows."""
    clear(rows, size, FILE_BYTES_MAX)
    for start, end in cleared:
        clear(rows, start, end)
    for row in added:
        insert(rows, row)


def map_root(rows: Sequence[Row]) -> Hash:
    """Hash tree over the map: one hash per non-empty window, then one over all of them."""
    windows: list[bytes] = []
    current: list[bytes] = []
    number = -1
    for row in rows:
        window = row.file_offset // MAP_WINDOW_BYTES
        if window != number:
            if current:
                windows.append(_window_hash(number, current))
            number, current = window, []
        current.append(
            _ROW.pack(
                row.file_offset, row.length, row.extent_id, row.extent_offset, row.key_version
            )
        )
    if current:
        windows.append(_window_hash(number, current))
    return merkle.hash_in_context(_ROOT_CONTEXT, b"".join(windows))


def _window_hash(number: int, rows: list[bytes]) -> bytes:
    return _WINDOW.pack(number, merkle.hash_in_context(_WINDOW_CONTEXT, b"".join(rows)))


EMPTY_MAP_ROOT = map_root(())


def runs(rows: Sequence[Row], start: int, end: int) -> list[tuple[int, int, Row | None]]:
    """Cut [start, end) into (start, end, clipped row or None for a hole), in order."""
    found: list[tuple[int, int, Row | None]] = []
    first, last = overlapping(rows, start, end)
    position = start
    for row in rows[first:last]:
        part = row.clip(start, end)
        if part.file_offset > position:
            found.append((position, part.file_offset, None))
        found.append((part.file_offset, part.end, part))
        position = part.end
    if position < end:
        found.append((position, end, None))
    return found

"""A map from byte ranges to runs inside sources: what a file's unflushed bytes are. Pure."""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Generic, TypeVar

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Run(Generic[S]):
    """Bytes [start, end) of the file are bytes of `source` from `source_offset` on."""

    start: int
    end: int
    source: S
    source_offset: int

    def clip(self, start: int, end: int) -> "Run[S]":
        """The part inside [start, end), which must overlap."""
        low, high = max(self.start, start), min(self.end, end)
        assert low < high
        return Run(low, high, self.source, self.source_offset + low - self.start)


class IntervalMap(Generic[S]):
    """Sorted, disjoint runs; the newest insert wins."""

    def __init__(self) -> None:
        self.runs: list[Run[S]] = []
        self.total_bytes = 0
        """Bytes covered."""

    def __bool__(self) -> bool:
        return bool(self.runs)

    def _overlap(self, start: int, end: int) -> tuple[int, int]:
        first = bisect_right(self.runs, start, key=lambda run: run.end)
        last = first
        while last < len(self.runs) and self.runs[last].start < end:
            last += 1
        return first, last

    def clear(self, start: int, end: int) -> None:
        """Uncover [start, end)."""
        if start >= end:
            return
        first, last = self._overlap(start, end)
        kept = []
        for run in self.runs[first:last]:
            if run.start < start:
                kept.append(run.clip(run.start, start))
            if run.end > end:
                kept.append(run.clip(end, run.end))
        before = sum(run.end - run.start for run in self.runs[first:last])
        self.total_bytes -= before - sum(run.end - run.start for run in kept)
        self.runs[first:last] = kept

    def insert(self, start: int, end: int, source: S, source_offset: int) -> None:
        """Cover [start, end), a non-empty range."""
        assert start < end
        if self.runs and self.runs[-1].end <= start:  # appending is the common case
            self.runs.append(Run(start, end, source, source_offset))
            self.total_bytes += end - start
            return
        self.clear(start, end)
        first, _ = self._overlap(start, end)
        self.runs.insert(first, Run(start, end, source, source_offset))
        self.total_bytes += end - start

    def cut(self, start: int, end: int) -> list[tuple[int, int, Run[S] | None]]:
        """[start, end) in order as (start, end, clipped run or None where nothing covers)."""
        found: list[tuple[int, int, Run[S] | None]] = []
        first, last = self._overlap(start, end)
        position = start
        for run in self.runs[first:last]:
            part = run.clip(start, end)
            if part.start > position:
                found.append((position, part.start, None))
            found.append((part.start, part.end, part))
            position = part.end
        if position < end:
            found.append((position, end, None))
        return found

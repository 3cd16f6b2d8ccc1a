"""The redundancy scheme and the arithmetic of segments, stripes, shares and pieces.

A segment of `size` bytes is cut into full stripes of k x 65,552 bytes and at most one tail stripe
whose shares are ceil(rest / k) bytes long (docs/specs/segment.md).
"""

from dataclasses import dataclass
from typing import Self

from network.errors import InvalidArgument
from network.limits import PIECES_PER_SEGMENT_MAX, RECORD_BYTES, STRIPES_MAX


@dataclass(frozen=True, slots=True)
class RedundancyScheme:
    """required/repair/success/total, as in 29/35/80/110."""

    required: int
    """k: any so many pieces rebuild the segment."""
    repair: int
    """At or below so many healthy pieces the segment is repaired at the latest."""
    success: int
    """n: so many indices exist."""
    total: int
    """So many nodes are offered for an upload."""

    def __post_init__(self) -> None:
        if not 1 <= self.required <= self.repair <= self.success <= self.total:
            raise InvalidArgument(f"redundancy {self} must not decrease from left to right")
        if self.success > PIECES_PER_SEGMENT_MAX or self.success == self.required:
            raise InvalidArgument(f"redundancy {self} needs more pieces than required, at most 256")
        if self.total > 1024:
            raise InvalidArgument(f"redundancy {self} offers more than 1024 nodes")

    def __str__(self) -> str:
        return f"{self.required}/{self.repair}/{self.success}/{self.total}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `29/35/80/110`; raises InvalidArgument."""
        parts = text.strip().split("/")
        if len(parts) != 4 or not all(part.isdigit() and len(part) <= 4 for part in parts):
            raise InvalidArgument(f"redundancy must look like 29/35/80/110, not {text!r}")
        return cls(*(int(part) for part in parts))

    @property
    def durability_line(self) -> int:
        """Receipts from which a degraded commit is allowed: 54 at 29/35/80 (DESIGN, settled).

        For other schemes midway between repair and success, never below required + 1.
        """
        if (self.required, self.repair, self.success) == (29, 35, 80):
            return 54
        return max(self.required + 1, (self.repair + self.success) // 2)

    @property
    def segment_bytes_max(self) -> int:
        """Ciphertext bytes of a segment of STRIPES_MAX full stripes."""
        return STRIPES_MAX * self.required * RECORD_BYTES


DEFAULT_SCHEME = RedundancyScheme(29, 35, 80, 110)


@dataclass(frozen=True, slots=True)
class SegmentLayout:
    """Where the bytes of one segment lie: k data shares a stripe, full stripes then a tail."""

    required: int
    size: int
    """Ciphertext bytes, at least 1."""

    def __post_init__(self) -> None:
        if self.size < 1 or self.size > STRIPES_MAX * self.required * RECORD_BYTES:
            raise InvalidArgument(f"a segment cannot hold {self.size} bytes")

    @property
    def full_stripes(self) -> int:
        """Stripes whose shares are RECORD_BYTES long."""
        return self.size // (self.required * RECORD_BYTES)

    @property
    def tail_share_bytes(self) -> int:
        """Share size of the tail stripe, 0 when there is none."""
        rest = self.size - self.full_stripes * self.required * RECORD_BYTES
        return -(-rest // self.required)

    @property
    def stripes(self) -> int:
        """All stripes: the number of shares in each piece."""
        return self.full_stripes + (1 if self.tail_share_bytes else 0)

    @property
    def piece_bytes(self) -> int:
        """Bytes of one piece, the same for every index."""
        return self.full_stripes * RECORD_BYTES + self.tail_share_bytes

    def share_bytes(self, stripe: int) -> int:
        """Length of every share of `stripe`."""
        assert 0 <= stripe < self.stripes
        return RECORD_BYTES if stripe < self.full_stripes else self.tail_share_bytes

    def stripe_range(self, stripe: int) -> tuple[int, int]:
        """[start, end) of a stripe's user bytes; the tail's end is the segment's end."""
        start = stripe * self.required * RECORD_BYTES
        return start, min(self.size, start + self.required * RECORD_BYTES)

    def shares_of(self, start: int, end: int) -> list[tuple[int, int]]:
        """(stripe, data index) of every share that holds a byte of [start, end), in order."""
        assert 0 <= start < end <= self.size
        found = []
        width = self.required * RECORD_BYTES
        for stripe in range(start // width, (end - 1) // width + 1):
            base, share = stripe * width, self.share_bytes(stripe)
            first = max(0, start - base) // share
            last = min(self.required - 1, (end - 1 - base) // share)
            found += [(stripe, index) for index in range(first, last + 1)]
        return found

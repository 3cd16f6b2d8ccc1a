"""How long a writer is held back while the write-back log fills up. Pure but for the clock's time.

Below the line writers go at the disk's speed. Above it the rate they are allowed falls towards
what the network has lately taken, which it reaches when the log is full.
"""

LINE = 0.75
"""Share of the budget above which writers are slowed."""
WAIT_S_MAX = 1.0
RATE_UNKNOWN = 1 << 20
"""Bytes per second assumed before anything has been sent, or when nothing is."""
_MEMORY_S = 10.0


class DrainRate:
    """Bytes per second that leave the log, over about ten seconds."""

    def __init__(self) -> None:
        self._rate = 0.0
        self._at = 0.0

    def note(self, count: int, now: float) -> None:
        """`count` bytes have been committed."""
        self._rate = self.at(now) + count / _MEMORY_S
        self._at = now

    def at(self, now: float) -> float:
        """The rate now: what was sent long ago counts less."""
        return self._rate * max(0.0, 1.0 - (now - self._at) / _MEMORY_S)


def wait_s(count: int, used: int, budget: int, drained_per_s: float) -> float:
    """Seconds to hold a write of `count` bytes back while the log holds `used` of `budget`."""
    over = (used / budget - LINE) / (1.0 - LINE)
    if over <= 0.0:
        return 0.0
    return min(WAIT_S_MAX, over * count / max(drained_per_s, RATE_UNKNOWN))

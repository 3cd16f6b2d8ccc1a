"""What a bucket's quota leaves: for df, and so that a writer hears of it before it is too late.

The satellite counts and decides. A mount asks it now and then, refuses what would not be taken,
and is never stricter than the satellite: what overwrites is not more.
"""

import errno
import logging

import trio

from dcsfs.fs.errors import FsError
from dcsfs.fs.reader import Reader
from dcsfs.fs.state import Inode, resolve
from dcsfs.fs.volume import Volume
from dcsfs.fs.writeback import Writeback
from network import messages as m
from network.errors import DcsError
from network.limits import CLOSE_COMMIT_DEADLINE_S
from network.units import format_size

log = logging.getLogger(__name__)

ASK_AGAIN_S = 5.0
ANSWER_DEADLINE_S = 3.0
"""df on a mount whose satellite is away shows what was known last."""


class Space:
    """The room in one volume's bucket."""

    def __init__(self, volume: Volume, reader: Reader, writeback: Writeback | None) -> None:
        self._volume = volume
        self._reader = reader
        self._writeback = writeback
        self.quota_bytes = volume.client.info.quota_bytes
        """0: as much as one likes."""
        self.used_bytes = volume.client.info.used_bytes
        """As the satellite has counted; what is staged here is not in it."""
        self._asked_at = trio.current_time()
        self._settled_when_asked = 0
        self._batches_seen = 0

    @property
    def free_bytes(self) -> int:
        """What can be written still, by all that is known."""
        staged = 0 if self._volume.is_read_only else self._volume.dirty_bytes
        return max(0, self.quota_bytes - self.used_bytes - staged)

    def _settled(self) -> int:
        """Bytes staged once and not any more: committed, cut off, or removed."""
        return self._volume.staged_bytes - self._volume.dirty_bytes

    @property
    def _certain_bytes(self) -> int:
        """What surely can be written still: as if nothing settled since the answer was removed."""
        return self.free_bytes - (self._settled() - self._settled_when_asked)

    async def refresh(self, age_s: float = ASK_AGAIN_S) -> None:
        """Ask the satellite if the last answer is older than that, or than a commit of this mount.

        Never raises, never hangs.
        """
        client = self._volume.client
        batches = self._writeback.flushed_batches if self._writeback is not None else 0
        if trio.current_time() - self._asked_at < age_s and batches == self._batches_seen:
            return
        self._asked_at, self._batches_seen = trio.current_time(), batches
        settled = self._settled()
        request = m.BucketRequest(client.api_key, client.bucket)
        try:
            with trio.move_on_after(ANSWER_DEADLINE_S):
                info = await client.call(m.GET_BUCKET, request)
                self.quota_bytes, self.used_bytes = info.quota_bytes, info.used_bytes
                self._settled_when_asked = settled
        except DcsError as error:
            log.info("the quota is not known: %s", error)

    async def check_write(self, inode: Inode, offset: int, count: int) -> None:
        """EDQUOT if the satellite would not take these bytes; no checkpoint while there is room."""
        if not self.quota_bytes or count <= self._certain_bytes:
            return
        if not await self._growth(inode, offset, count):
            return
        await self.refresh(0.0)
        if count <= self._certain_bytes:
            return
        await self._commit_what_is_staged()
        await self.refresh(0.0)
        growth = await self._growth(inode, offset, count)
        if self.quota_bytes and growth > self.free_bytes:
            used, quota = format_size(self.used_bytes), format_size(self.quota_bytes)
            raise FsError(errno.EDQUOT, f"the bucket holds {used} of {quota}")

    async def _growth(self, inode: Inode, offset: int, count: int) -> int:
        """How many of these bytes are not in the file yet."""
        rows = await self._reader.rows_of(inode)
        pieces = resolve(inode, offset, offset + count, rows)
        return sum(p.end - p.start for p in pieces if p.staged is None and p.row is None)

    async def _commit_what_is_staged(self) -> None:
        """Only their commit tells what overwrites cost, and removals give back."""
        assert self._writeback is not None
        with trio.move_on_after(CLOSE_COMMIT_DEADLINE_S):
            while self._has_staged() and self._writeback.refusal is None:
                self._writeback.demand()
                with trio.move_on_after(1.0):
                    await self._writeback.next_progress()

    def _has_staged(self) -> bool:
        return bool(self._volume.dirty_bytes) or self._volume.has_backlog

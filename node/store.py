"""What a node keeps: pieces in the log, an index over them, serials and orders.

The log is the truth. The SQLite index is written without waiting for the disk and is brought up
to date from the log at start, from the position it last knew; nothing acknowledged depends on it.
"""

import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from network.codec import Max, pack, unpack
from network.errors import InvalidArgument, LimitExceeded, NodeFull, NotFound, OrderRefused
from network.ids import Hash, PieceID, SerialNumber
from network.orders import HashPath, Order, OrderLimit
from node.log import DELETION, PIECE, PieceLog, Region

_FOOTER_OVERHEAD_BYTES = 2048  # limit, order, path of at most 16 hashes, geometry
_SCHEMA = """
-- One row per stored piece; rebuilt from the log's tail at start.
CREATE TABLE IF NOT EXISTS piece (
    piece_id BLOB PRIMARY KEY,     -- 32 bytes
    file INTEGER NOT NULL,         -- number of the log file
    offset INTEGER NOT NULL,       -- of the region's prefix
    body_bytes INTEGER NOT NULL,   -- piece length
    footer_bytes INTEGER NOT NULL, -- room of the footer
    record BLOB NOT NULL,          -- packed PieceRecord: geometry, share hashes, path
    expires_s INTEGER NOT NULL     -- 0: never
) WITHOUT ROWID;
-- Highest order seen per serial, kept for settlement and against replay.
CREATE TABLE IF NOT EXISTS serial (
    serial BLOB PRIMARY KEY,       -- 16 bytes, begins with the expiry
    action INTEGER NOT NULL,
    amount INTEGER NOT NULL,       -- highest amount ordered
    used INTEGER NOT NULL,         -- bytes moved under this serial
    limit_bytes BLOB NOT NULL,     -- packed OrderLimit, for settlement
    order_bytes BLOB NOT NULL,     -- packed Order with the highest amount
    settled INTEGER NOT NULL       -- 0 until the satellite has taken it
) WITHOUT ROWID;
-- One row: how far into the log the index reaches, and the count that `status` prints.
CREATE TABLE IF NOT EXISTS state (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    file INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    stored_bytes INTEGER NOT NULL  -- piece bytes and hash data of live pieces
);
INSERT OR IGNORE INTO state VALUES (1, 0, 0, 0);
"""


@dataclass(frozen=True, slots=True)
class PieceRecord:
    """The footer of a piece region."""

    piece_id: PieceID
    index: int
    total: int
    share_size: int
    share_count: int
    piece_bytes: int
    piece_root: Hash
    share_hashes: Annotated[bytes, Max(32 * 64)]
    path: HashPath
    expires_s: int
    limit: OrderLimit
    order: Order

    @property
    def stored_bytes(self) -> int:
        """What counts against the capacity: the piece and its hash data."""
        return self.piece_bytes + len(self.share_hashes) + 32 * len(self.path)


@dataclass(frozen=True, slots=True)
class _DeletionRecord:
    piece_id: PieceID


class PieceStore:
    """Blocking; the caller runs `sync` and `read` in a thread, all else on the event loop."""

    def __init__(self, directory: Path, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._log = PieceLog(directory / "pieces")
        self._db = sqlite3.connect(
            directory / "index.db", isolation_level=None, check_same_thread=False
        )
        self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;" + _SCHEMA)
        self._reserved_bytes = 0
        self._spent: dict[SerialNumber, tuple[OrderLimit, Order, int]] = {}
        self.stored_bytes = 0
        self.syncs = 0
        self._catch_up()

    def _catch_up(self) -> None:
        file, offset, self.stored_bytes = self._db.execute(
            "SELECT file, offset, stored_bytes FROM state"
        ).fetchone()
        self._db.execute("BEGIN")
        for region, data in self._log.scan(file, offset):
            if data is None:
                if region.body_bytes:
                    self._log.discard(region)
            elif region.kind == PIECE:
                self._index_piece(region, unpack(PieceRecord, data))
            elif region.kind == DELETION:
                self._unindex_piece(unpack(_DeletionRecord, data).piece_id)
        self._save_position(self._log.position())
        self._db.execute("COMMIT")

    def _save_position(self, position: tuple[int, int]) -> None:
        self._db.execute(
            "UPDATE state SET file=?, offset=?, stored_bytes=?", (*position, self.stored_bytes)
        )

    def _save_count(self) -> None:
        self._db.execute("UPDATE state SET stored_bytes=?", (self.stored_bytes,))

    def _index_piece(self, region: Region, record: PieceRecord) -> None:
        if self._find(record.piece_id) is not None:
            return  # replayed from the log: the first upload of an id stands
        self._db.execute(
            "INSERT INTO piece VALUES (?,?,?,?,?,?,?)",
            (
                record.piece_id, region.file, region.offset, region.body_bytes,
                region.footer_bytes, pack(record), record.expires_s,
            ),
        )  # fmt: skip
        self.stored_bytes += record.stored_bytes
        self._note_order(record.limit, record.order, record.piece_bytes)

    def _unindex_piece(self, piece_id: PieceID) -> Region | None:
        found = self._find(piece_id)
        if found is None:
            return None
        region, record = found
        self._db.execute("DELETE FROM piece WHERE piece_id=?", (piece_id,))
        self.stored_bytes -= record.stored_bytes
        return region

    def _find(self, piece_id: PieceID) -> tuple[Region, PieceRecord] | None:
        row = self._db.execute(
            "SELECT file, offset, body_bytes, footer_bytes, record FROM piece WHERE piece_id=?",
            (piece_id,),
        ).fetchone()
        if row is None:
            return None
        return Region(row[0], row[1], PIECE, row[2], row[3]), unpack(PieceRecord, row[4])

    def _note_order(self, limit: OrderLimit, order: Order, used: int) -> None:
        self._db.execute(
            "INSERT INTO serial VALUES (?,?,?,?,?,?,0) ON CONFLICT (serial) DO UPDATE SET"
            " amount=max(amount, excluded.amount), used=excluded.used,"
            " order_bytes=CASE WHEN excluded.amount > amount THEN excluded.order_bytes"
            " ELSE order_bytes END",
            (limit.serial, limit.action, order.amount, used, pack(limit), pack(order)),
        )

    def pieces(self) -> int:
        """How many pieces are stored."""
        count: int = self._db.execute("SELECT count(*) FROM piece").fetchone()[0]
        return count

    def unsettled_orders(self) -> int:
        """How many orders wait for settlement."""
        count: int = self._db.execute("SELECT count(*) FROM serial WHERE settled=0").fetchone()[0]
        return count

    def used_bytes(self, limit: OrderLimit) -> int:
        """Bytes already moved under this serial."""
        pending = self._spent.get(limit.serial)
        if pending is not None:
            return pending[2]
        row = self._db.execute("SELECT used FROM serial WHERE serial=?", (limit.serial,)).fetchone()
        return int(row[0]) if row else 0

    def spend(self, limit: OrderLimit, order: Order, amount: int) -> None:
        """Count `amount` bytes of a GET against its order; raises LimitExceeded.

        Kept in memory until `save_spent`: a crash forgets at most what was spent since.
        """
        used = self.used_bytes(limit) + amount
        if used > min(order.amount, limit.byte_limit):
            raise LimitExceeded(f"{used} bytes under this serial pass its order of {order.amount}")
        before = self._spent.get(limit.serial)
        if before is not None and before[1].amount > order.amount:
            order = before[1]
        self._spent[limit.serial] = (limit, order, used)

    def save_spent(self) -> None:
        """Write what has been spent since the last call; called every few seconds and at a stop."""
        if not self._spent:
            return
        self._db.execute("BEGIN")
        for limit, order, used in self._spent.values():
            self._note_order(limit, order, used)
        self._db.execute("COMMIT")
        self._spent.clear()

    def begin_put(self, limit: OrderLimit, piece_bytes: int, share_count: int) -> Region:
        """Reserve room; raises NodeFull, OrderRefused (serial used), InvalidArgument."""
        if self._serial_used(limit):
            raise OrderRefused("serial number has been used")
        if self._find(limit.piece_id) is not None:
            raise InvalidArgument("piece is already stored")
        footer = 32 * share_count + _FOOTER_OVERHEAD_BYTES
        needed = piece_bytes + 32 * share_count
        if self.stored_bytes + self._reserved_bytes + needed > self._capacity_bytes:
            raise NodeFull("this node is full")
        try:
            region = self._log.reserve(PIECE, piece_bytes, footer)
        except OSError as error:
            raise NodeFull(f"this node's disk refused a write: {error.strerror}") from error
        self._reserved_bytes += needed
        return region

    def _serial_used(self, limit: OrderLimit) -> bool:
        query = "SELECT 1 FROM serial WHERE serial=?"
        return self._db.execute(query, (limit.serial,)).fetchone() is not None

    def write(self, region: Region, position: int, data: memoryview) -> None:
        """Write shares; raises NodeFull when the disk refuses."""
        try:
            self._log.write_body(region, position, data)
        except OSError as error:
            raise NodeFull(f"this node's disk refused a write: {error.strerror}") from error

    def end_put(self, region: Region, record: PieceRecord | None) -> None:
        """Write the footer, or give an abandoned region back when `record` is None."""
        self._reserved_bytes -= region.body_bytes + region.footer_bytes - _FOOTER_OVERHEAD_BYTES
        if record is None:
            self._log.discard(region)
            return
        try:
            self._log.finish(region, pack(record))
        except OSError as error:
            raise NodeFull(f"this node's disk refused a write: {error.strerror}") from error

    def sync(self, files: set[int]) -> None:
        """Make log files durable; safe in a thread beside other calls."""
        self._log.sync(files)
        self.syncs += 1

    def sync_pieces(self, finished: list[tuple[Region, PieceRecord]]) -> None:
        """Make finished pieces durable; safe in a thread beside other calls.

        The latter half of a segment's indices, parity as a rule, is read only when other nodes
        fail: it does not stay in the page cache.
        """
        self.sync({region.file for region, _ in finished})
        for region, record in finished:
            if 2 * record.index >= record.total:
                self._log.forget_pages(region)

    def publish(self, finished: list[tuple[Region, PieceRecord]]) -> None:
        """Index pieces that `sync` has made durable."""
        self._db.execute("BEGIN")
        for region, record in finished:
            self._index_piece(region, record)
        self._save_count()
        self._db.execute("COMMIT")

    def checkpoint(self) -> None:
        """Remember the log position: a clean stop starts again without a scan."""
        self.save_spent()
        self._db.execute("BEGIN")
        self._save_position(self._log.position())
        self._db.execute("COMMIT")

    def open_piece(self, piece_id: PieceID) -> tuple[Region, PieceRecord]:
        """Find a piece; raises NotFound."""
        found = self._find(piece_id)
        if found is None:
            raise NotFound("piece is not stored here")
        return found

    def read_into(self, region: Region, position: int, target: memoryview) -> int:
        """Bytes of a piece, as the disk has them: the reader verifies. For a thread."""
        return self._log.read_into(region.file, region.body_offset + position, target)

    def read_cached(self, region: Region, position: int, target: memoryview) -> int:
        """As `read_into`, without waiting: 0 or fewer bytes when they are not in memory."""
        return self._log.read_cached(region.file, region.body_offset + position, target)

    def begin_delete(self, piece_id: PieceID) -> int | None:
        """Log a deletion; returns the log file to `sync` before `end_delete`, None if absent."""
        if self._find(piece_id) is None:
            return None
        mark = self._log.reserve(DELETION, 0, 64)
        self._log.finish(mark, pack(_DeletionRecord(piece_id)))
        return mark.file

    def end_delete(self, piece_id: PieceID) -> None:
        """Drop a piece whose deletion is durable and give its bytes back to the disk."""
        self._db.execute("BEGIN")
        region = self._unindex_piece(piece_id)
        self._save_count()
        self._db.execute("COMMIT")
        if region is not None:
            self._log.discard(region)

    def spans(self) -> list[tuple[int, int, int]]:
        """(file, offset, bytes) of every piece body, for tools that check or damage the disk."""
        rows = self._db.execute("SELECT file, offset, body_bytes FROM piece").fetchall()
        return [
            (file, Region(file, offset, PIECE, size, 0).body_offset, size)
            for file, offset, size in rows
        ]

    def close(self) -> None:
        """Close without a checkpoint, as a crash would."""
        self._db.close()
        self._log.close()

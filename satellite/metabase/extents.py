"""Extent maps, placements, reference counts and segments' live bytes."""

from collections.abc import Iterable

from network.errors import InvalidArgument, NotFound, PreconditionFailed, QuotaExceeded
from network.extentmap import Row, apply_edits, check_rows
from network.ids import ExtentID, SegmentID
from network.limits import FILE_BYTES_MAX, MAP_PAGE_ROWS_MAX
from network.messages import CommitContent, Kind, Placement, PutInline
from network.units import format_size
from satellite.db.database import DbRow, Transaction

INLINE = SegmentID(bytes(16))
_ROW_COLUMNS = "file_offset, length, extent_id, extent_offset, key_version"


def row_from(values: DbRow) -> Row:
    """Build a map row from its five columns."""
    offset, length, extent_id, extent_offset, key_version = values
    assert isinstance(extent_id, bytes)
    return Row(int(offset), int(length), ExtentID(extent_id), int(extent_offset), int(key_version))


def load_page(tx: Transaction, bucket_id: int, inode: int, after: int) -> tuple[list[Row], bool]:
    """Rows that begin at or after a file offset, one page, and whether there are more."""
    rows = tx.all(
        f"SELECT {_ROW_COLUMNS} FROM extent_row WHERE bucket_id=? AND inode=?"
        " AND file_offset>=? ORDER BY file_offset LIMIT ?",
        (bucket_id, inode, after, MAP_PAGE_ROWS_MAX + 1),
    )
    return [row_from(row) for row in rows[:MAP_PAGE_ROWS_MAX]], len(rows) > MAP_PAGE_ROWS_MAX


def _load_overlapping(
    tx: Transaction, bucket_id: int, inode: int, start: int, end: int
) -> list[Row]:
    # Rows never cross a 64 MiB window, so a row that covers `start` begins in its window.
    rows = tx.all(
        f"SELECT {_ROW_COLUMNS} FROM extent_row WHERE bucket_id=? AND inode=?"
        " AND file_offset>=? AND file_offset<? ORDER BY file_offset",
        (bucket_id, inode, start - start % (1 << 26), end),
    )
    return [row_from(row) for row in rows]


def placements_of(tx: Transaction, bucket_id: int, rows: list[Row]) -> list[Placement]:
    """The placement of each distinct extent of `rows`."""
    found = []
    for extent_id in dict.fromkeys(row.extent_id for row in rows):
        row = tx.one(
            "SELECT segment_id, segment_offset, ciphertext_bytes FROM extent"
            " WHERE bucket_id=? AND extent_id=?",
            (bucket_id, extent_id),
        )
        if row is not None:
            assert isinstance(row[0], bytes)
            found.append(Placement(extent_id, SegmentID(row[0]), int(row[1]), int(row[2])))
    return found


def count_references(tx: Transaction, bucket_id: int, extent_id: ExtentID, change: int) -> None:
    """Change an extent's reference count; its segment's live bytes follow.

    Raises PreconditionFailed for an extent that no committed segment holds.
    """
    row = tx.one(
        "SELECT reference_count, ciphertext_bytes, segment_id FROM extent"
        " WHERE bucket_id=? AND extent_id=?",
        (bucket_id, extent_id),
    )
    if row is None:
        raise PreconditionFailed(f"extent {extent_id} is not committed")
    before, size, segment_id = int(row[0]), int(row[1]), row[2]
    after = before + change
    assert after >= 0
    tx.execute(
        "UPDATE extent SET reference_count=? WHERE bucket_id=? AND extent_id=?",
        (after, bucket_id, extent_id),
    )
    live = (after > 0) - (before > 0)
    if segment_id == INLINE:
        if after == 0:
            key = (bucket_id, extent_id)
            tx.execute("DELETE FROM inline_extent WHERE bucket_id=? AND extent_id=?", key)
            tx.execute("DELETE FROM extent WHERE bucket_id=? AND extent_id=?", key)
    elif live:
        tx.execute(
            "UPDATE segment SET live_bytes=live_bytes+? WHERE segment_id=?",
            (live * size, segment_id),
        )


def apply_commit_content(tx: Transaction, bucket_id: int, op: CommitContent) -> None:
    """CommitContent; see its message for the precondition."""
    row = tx.one(
        "SELECT kind, content_version FROM inode WHERE bucket_id=? AND inode=?",
        (bucket_id, op.inode),
    )
    if row is None:
        raise NotFound(f"inode {op.inode} does not exist")
    if row[0] != Kind.FILE:
        raise InvalidArgument("only files have content")
    if row[1] != op.expected_version:
        raise PreconditionFailed(
            f"content is at version {int(row[1])}, the commit is based on {op.expected_version}"
        )
    if not 0 <= op.cut <= FILE_BYTES_MAX or not 0 <= op.size <= FILE_BYTES_MAX:
        raise InvalidArgument("file size is out of range")
    check_rows(op.rows)
    _edit_map(tx, bucket_id, op)
    tx.execute(
        "UPDATE inode SET size=?, allocated=?, content_version=content_version+1"
        " WHERE bucket_id=? AND inode=?",
        (op.size, op.allocated, bucket_id, op.inode),
    )


def _edit_map(tx: Transaction, bucket_id: int, op: CommitContent) -> None:
    touched = [(item.start, item.end) for item in op.cleared]
    touched += [(row.file_offset, row.end) for row in op.rows]
    loaded: dict[int, Row] = {}
    for start, end in (*touched, (op.cut, FILE_BYTES_MAX)):
        if not 0 <= start <= end <= FILE_BYTES_MAX:
            raise InvalidArgument("range is not valid")
        for row in _load_overlapping(tx, bucket_id, op.inode, start, end):
            loaded[row.file_offset] = row
    before = [loaded[offset] for offset in sorted(loaded)]
    after = list(before)
    apply_edits(after, op.cut, [(item.start, item.end) for item in op.cleared], op.rows)
    if after and after[-1].end > op.size:
        raise InvalidArgument("extent rows pass the end of the file")
    removed, added = set(before) - set(after), set(after) - set(before)
    _count_used(tx, bucket_id, _length_of(added) - _length_of(removed))
    for row in added:
        count_references(tx, bucket_id, row.extent_id, 1)
    for row in removed:
        count_references(tx, bucket_id, row.extent_id, -1)
    tx.execute_many(
        "DELETE FROM extent_row WHERE bucket_id=? AND inode=? AND file_offset=?",
        [(bucket_id, op.inode, row.file_offset) for row in removed],
    )
    tx.execute_many(
        "INSERT INTO extent_row VALUES (?,?,?,?,?,?,?)",
        [
            (bucket_id, op.inode, row.file_offset, row.length, row.extent_id,
             row.extent_offset, row.key_version)
            for row in added
        ],
    )  # fmt: skip


def _length_of(rows: Iterable[Row]) -> int:
    return sum(row.length for row in rows)


def _count_used(tx: Transaction, bucket_id: int, growth: int) -> None:
    """Add to what a bucket holds; QuotaExceeded if it would grow past its quota."""
    if growth > 0:
        row = tx.one("SELECT quota_bytes, used_bytes FROM bucket WHERE bucket_id=?", (bucket_id,))
        assert row is not None
        quota, used = int(row[0]), int(row[1])
        if quota and used + growth > quota:
            raise QuotaExceeded(
                f"the bucket holds {format_size(used)} of {format_size(quota)}, "
                f"and {format_size(growth)} more were to come"
            )
    if growth:
        tx.execute(
            "UPDATE bucket SET used_bytes=used_bytes+? WHERE bucket_id=?", (growth, bucket_id)
        )


def drop_map(tx: Transaction, bucket_id: int, inode: int) -> None:
    """Remove a whole map, releasing its extents."""
    rows = tx.all(
        f"SELECT {_ROW_COLUMNS} FROM extent_row WHERE bucket_id=? AND inode=?",
        (bucket_id, inode),
    )
    dropped = [row_from(values) for values in rows]
    for row in dropped:
        count_references(tx, bucket_id, row.extent_id, -1)
    _count_used(tx, bucket_id, -_length_of(dropped))
    tx.execute("DELETE FROM extent_row WHERE bucket_id=? AND inode=?", (bucket_id, inode))


def insert_placement(tx: Transaction, bucket_id: int, placement: Placement) -> None:
    """Register an extent without references; raises InvalidArgument if its id is taken."""
    taken = tx.one(
        "SELECT 1 FROM extent WHERE bucket_id=? AND extent_id=?",
        (bucket_id, placement.extent_id),
    )
    if taken:
        raise InvalidArgument(f"extent {placement.extent_id} is already placed")
    tx.execute(
        "INSERT INTO extent VALUES (?,?,?,?,?,0)",
        (
            bucket_id, placement.extent_id, placement.segment_id, placement.offset,
            placement.ciphertext_bytes,
        ),
    )  # fmt: skip


def apply_put_inline(tx: Transaction, bucket_id: int, op: PutInline) -> None:
    """PutInline."""
    placement = Placement(op.extent_id, INLINE, 0, len(op.ciphertext))
    insert_placement(tx, bucket_id, placement)
    tx.execute("INSERT INTO inline_extent VALUES (?,?,?)", (bucket_id, op.extent_id, op.ciphertext))

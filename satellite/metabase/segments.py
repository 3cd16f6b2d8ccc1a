"""Segments and their pieces: offered, committed, opened for reading, reported."""

from dataclasses import dataclass

from network.codec import pack
from network.errors import InvalidArgument, NotFound, PreconditionFailed
from network.ids import Hash, NodeID, SegmentID
from network.messages import PutSegment
from network.orders import derive_piece_id
from network.redundancy import RedundancyScheme, SegmentLayout
from satellite.db.database import Transaction
from satellite.metabase import extents


@dataclass(frozen=True, slots=True)
class StoredSegment:
    """A committed segment, enough to write GET limits for it."""

    segment_id: SegmentID
    size: int
    root: Hash
    scheme: RedundancyScheme
    secret: bytes
    pieces: tuple[tuple[int, int], ...]
    """(piece index, node number), by index."""


def offer(
    tx: Transaction,
    bucket_id: int,
    segment_id: SegmentID,
    size: int,
    scheme: RedundancyScheme,
    secret: bytes,
    now_ns: int,
) -> None:
    """Note a segment that is about to be uploaded."""
    tx.execute(
        "INSERT INTO segment VALUES (?,?,0,?,?,?,?,?,?,0,0,?,0,?)",
        (
            segment_id, bucket_id, size, bytes(32), scheme.required, scheme.repair,
            scheme.success, scheme.total, secret, now_ns,
        ),
    )  # fmt: skip


def apply_put_segment(tx: Transaction, bucket_id: int, op: PutSegment) -> None:
    """PutSegment: commit an offered segment with its receipts and extents."""
    row = tx.one(
        "SELECT state, size, required, repair, success, total, secret FROM segment"
        " WHERE segment_id=? AND bucket_id=?",
        (op.segment_id, bucket_id),
    )
    if row is None:
        raise NotFound(f"segment {op.segment_id} was not offered")
    state, size, required, repair, success, total, secret = row
    assert isinstance(secret, bytes)
    if state != 0 or size != op.size:
        raise PreconditionFailed(f"segment {op.segment_id} is not open for this commit")
    scheme = RedundancyScheme(int(required), int(repair), int(success), int(total))
    _insert_pieces(tx, op, scheme, secret)
    end = 0
    for placement in sorted(op.placements, key=lambda item: item.offset):
        if placement.offset < end or placement.segment_id != op.segment_id:
            raise InvalidArgument("placements overlap or name another segment")
        end = placement.offset + placement.ciphertext_bytes
        extents.insert_placement(tx, bucket_id, placement)
    if end > op.size:
        raise InvalidArgument("placements pass the segment's end")
    tx.execute("UPDATE segment SET state=1, root=? WHERE segment_id=?", (op.root, op.segment_id))


def _insert_pieces(
    tx: Transaction, op: PutSegment, scheme: RedundancyScheme, secret: bytes
) -> None:
    piece_bytes = SegmentLayout(scheme.required, op.size).piece_bytes
    indices = {piece.index for piece in op.pieces}
    nodes = {piece.receipt.node_id for piece in op.pieces}
    if len(indices) != len(op.pieces) or len(nodes) != len(op.pieces):
        raise InvalidArgument("an index or a node appears twice")
    if len(indices) < min(scheme.durability_line, scheme.success):
        raise InvalidArgument(
            f"{len(indices)} receipts, the durability line is {scheme.durability_line}"
        )
    for piece in op.pieces:
        receipt = piece.receipt
        if not 0 <= piece.index < scheme.success or receipt.piece_bytes != piece_bytes:
            raise InvalidArgument("a receipt is for another piece")
        if receipt.piece_id != derive_piece_id(secret, receipt.node_id, 0):
            raise InvalidArgument("a receipt is for another segment")
        number = tx.number("SELECT node_number FROM node WHERE node_id=?", (receipt.node_id,))
        if not number:
            raise InvalidArgument("a receipt is from an unknown node")
        tx.execute(
            "INSERT INTO piece VALUES (?,?,?,?)",
            (op.segment_id, piece.index, number, pack(receipt)),
        )


def find(tx: Transaction, bucket_id: int, segment_id: SegmentID) -> StoredSegment:
    """A committed segment of this bucket; raises NotFound."""
    row = tx.one(
        "SELECT size, root, required, repair, success, total, secret FROM segment"
        " WHERE segment_id=? AND bucket_id=? AND state=1",
        (segment_id, bucket_id),
    )
    if row is None:
        raise NotFound(f"segment {segment_id} does not exist")
    size, root, required, repair, success, total, secret = row
    assert isinstance(root, bytes)
    assert isinstance(secret, bytes)
    pieces = tx.all(
        "SELECT piece_index, node_number FROM piece WHERE segment_id=? ORDER BY piece_index",
        (segment_id,),
    )
    return StoredSegment(
        segment_id,
        int(size),
        Hash(root),
        RedundancyScheme(int(required), int(repair), int(success), int(total)),
        secret,
        tuple((int(index), int(number)) for index, number in pieces),
    )


def report_bad_share(
    tx: Transaction, segment_id: SegmentID, index: int, node_id: NodeID, now_s: int
) -> None:
    """Count a client's report once per piece; raises NotFound if the node does not hold it."""
    row = tx.one(
        "SELECT piece.node_number FROM piece JOIN node ON node.node_number=piece.node_number"
        " WHERE segment_id=? AND piece_index=? AND node_id=?",
        (segment_id, index, node_id),
    )
    if row is None:
        raise NotFound("that node does not hold that piece")
    number = int(row[0])
    known = tx.one(
        "SELECT 1 FROM bad_share_report WHERE segment_id=? AND piece_index=? AND node_number=?",
        (segment_id, index, number),
    )
    if known:
        return
    tx.execute("INSERT INTO bad_share_report VALUES (?,?,?,?)", (segment_id, index, number, now_s))
    tx.execute("UPDATE node SET bad_shares=bad_shares+1 WHERE node_number=?", (number,))

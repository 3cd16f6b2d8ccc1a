"""What uplinks and a node's owner say to a node (docs/specs/wire.md lists the numbers)."""

from dataclasses import dataclass
from typing import Annotated

from network.codec import Max
from network.ids import Hash, NodeID
from network.limits import FRAME_BODY_BYTES_MAX
from network.messages import Empty, Text
from network.method import Method, StreamEnd
from network.orders import HashPath, Order, OrderLimit, SignedRoot


@dataclass(frozen=True, slots=True)
class PutPieceRequest:
    """Open an upload; DATA frames of whole shares follow, then a FinishPiece as DATA header."""

    limit: OrderLimit
    proof: SignedRoot
    order: Order
    share_size: int
    """Bytes of the first share; all but the last are equal."""
    share_count: int
    piece_bytes: int


@dataclass(frozen=True, slots=True)
class FinishPiece:
    """What the shares must add up to, and the piece's place in its segment."""

    index: int
    total: int
    piece_root: Hash
    segment_root: Hash
    path: HashPath


@dataclass(frozen=True, slots=True)
class GetPieceRequest:
    """Read shares [first, first + count) of a piece."""

    limit: OrderLimit
    proof: SignedRoot
    order: Order
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class PieceInfo:
    """Geometry, hashes and path of a piece: the header before its shares."""

    index: int
    total: int
    share_size: int
    share_count: int
    piece_bytes: int
    share_hashes: Annotated[bytes, Max(32 * 64)]
    path: HashPath


@dataclass(frozen=True, slots=True)
class DeletePieceRequest:
    """Delete a piece under a DELETE limit."""

    limit: OrderLimit
    proof: SignedRoot


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """A node's own counts; only for the node's own identity."""

    node_id: NodeID
    host: Text
    port: int
    capacity_bytes: int
    stored_bytes: int
    """Piece bytes and hash data, as DESIGN settles it."""
    pieces: int
    unsettled_orders: int
    satellite: Text
    served_bytes: int
    received_bytes: int
    syncs: int


assert FRAME_BODY_BYTES_MAX >= 4 * 65552

PUT_PIECE = Method(64, PutPieceRequest, StreamEnd, 600.0)
GET_PIECE = Method(65, GetPieceRequest, StreamEnd, 600.0)
DELETE_PIECE = Method(66, DeletePieceRequest, Empty)
NODE_STATUS = Method(67, Empty, NodeStatus)

"""Order limits, orders and receipts: who may move how many bytes, and the proof that it happened.

All signatures are over fixed layouts (docs/specs/orders.md), never over a message as packed.
The satellite signs one Merkle root per segment operation; each node gets its limit and the path.
"""

import enum
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from network import merkle
from network.codec import Max
from network.errors import IntegrityError, LimitExceeded, OrderRefused
from network.identity import Identity, verify_signature
from network.ids import Hash, NodeID, PieceID, PublicKey, SerialNumber, Signature
from network.limits import CLOCK_SKEW_S

_LIMIT_CONTEXT = "dcsfs 2026 v1 order limit"
_LIMITS_PREFIX = b"dcsfs 2026 v1 order limits\0"
_ORDER_PREFIX = b"dcsfs 2026 v1 order\0"
_RECEIPT_CONTEXT = "dcsfs 2026 v1 receipt"
_RECEIPTS_PREFIX = b"dcsfs 2026 v1 receipts\0"
_PIECE_ID_CONTEXT = "dcsfs 2026 v1 piece id"

_LIMIT = struct.Struct(">BB16s32s32s32s32sQQQQ")
_ROOT = struct.Struct(">I32s")
_ORDER = struct.Struct(">16sQ")
_RECEIPT = struct.Struct(">B32s32s16s32sQQ")

HashPath = Annotated[tuple[Hash, ...], Max(16)]


class Action(enum.IntEnum):
    """What an order limit allows."""

    PUT = 1
    GET = 2
    GET_AUDIT = 3
    GET_REPAIR = 4
    PUT_REPAIR = 5
    DELETE = 6
    PUT_GRACEFUL_EXIT = 7


@dataclass(frozen=True, slots=True)
class OrderLimit:
    """One node's permission for one piece; part of a signed set."""

    action: Action
    serial: SerialNumber
    satellite_id: NodeID
    node_id: NodeID
    piece_id: PieceID
    uplink_key: PublicKey
    byte_limit: int
    created_s: int
    expires_s: int
    piece_expires_s: int
    """Unix seconds after which the node may drop the piece; 0 for never."""

    def leaf(self) -> Hash:
        """This limit's leaf in the signed tree: BLAKE3 over its fixed 178-byte layout."""
        return merkle.hash_in_context(_LIMIT_CONTEXT, self.encode())

    def encode(self) -> bytes:
        """The canonical bytes, version 1."""
        return _LIMIT.pack(
            1,
            self.action,
            self.serial,
            self.satellite_id,
            self.node_id,
            self.piece_id,
            self.uplink_key,
            self.byte_limit,
            self.created_s,
            self.expires_s,
            self.piece_expires_s,
        )


@dataclass(frozen=True, slots=True)
class SignedRoot:
    """A leaf's place in a signed Merkle tree."""

    index: int
    count: int
    path: HashPath
    signature: Signature


def sign_limits(identity: Identity, limits: Sequence[OrderLimit]) -> list[SignedRoot]:
    """One signature for all `limits`; the i-th result proves the i-th limit."""
    return _sign_leaves(identity.sign, _LIMITS_PREFIX, [limit.leaf() for limit in limits])


def _sign_leaves(
    sign: Callable[[bytes], Signature], prefix: bytes, leaves: list[Hash]
) -> list[SignedRoot]:
    tree = merkle.levels(leaves)
    signature = sign(prefix + _ROOT.pack(len(leaves), tree[-1][0]))
    return [
        SignedRoot(index, len(leaves), merkle.path(tree, index), signature)
        for index in range(len(leaves))
    ]


def _verify_leaf(prefix: bytes, leaf: Hash, proof: SignedRoot, public_key: bytes) -> None:
    try:
        root = merkle.root_from_path(leaf, proof.index, proof.count, proof.path)
    except IntegrityError as error:
        raise OrderRefused(f"hash path of the limit: {error}") from error
    verify_signature(public_key, proof.signature, prefix + _ROOT.pack(proof.count, root))


def verify_limit(
    limit: OrderLimit,
    proof: SignedRoot,
    *,
    satellite_id: NodeID,
    satellite_key: bytes,
    node_id: NodeID,
    now_s: int,
) -> None:
    """Raise OrderRefused unless the limit is signed by this satellite for this node and live."""
    if limit.satellite_id != satellite_id:
        raise OrderRefused("order limit is from a satellite this node does not serve")
    if limit.node_id != node_id:
        raise OrderRefused("order limit is for another node")
    if limit.expires_s <= now_s or limit.serial.expires_s != limit.expires_s:
        raise OrderRefused("order limit has expired")
    if limit.created_s > now_s + CLOCK_SKEW_S:
        raise OrderRefused("order limit was created in the future")
    _verify_leaf(_LIMITS_PREFIX, limit.leaf(), proof, satellite_key)


@dataclass(frozen=True, slots=True)
class Order:
    """The uplink's promise to pay for up to `amount` bytes under one serial."""

    serial: SerialNumber
    amount: int
    signature: Signature


def sign_order(key: Ed25519PrivateKey, serial: SerialNumber, amount: int) -> Order:
    """Sign the running total `amount` (bytes) for a serial."""
    message = _ORDER_PREFIX + _ORDER.pack(serial, amount)
    return Order(serial, amount, Signature(key.sign(message)))


def verify_order(order: Order, limit: OrderLimit) -> None:
    """Raise OrderRefused or LimitExceeded unless the order fits its limit."""
    if order.serial != limit.serial:
        raise OrderRefused("order is for another serial number")
    if order.amount > limit.byte_limit:
        raise LimitExceeded(
            f"order for {order.amount} bytes passes its limit of {limit.byte_limit}"
        )
    message = _ORDER_PREFIX + _ORDER.pack(order.serial, order.amount)
    verify_signature(limit.uplink_key, order.signature, message)


@dataclass(frozen=True, slots=True)
class Receipt:
    """A node's signed word that a piece is on its disk, synced."""

    piece_id: PieceID
    node_id: NodeID
    serial: SerialNumber
    piece_root: Hash
    piece_bytes: int
    stored_s: int
    proof: SignedRoot

    def leaf(self) -> Hash:
        """This receipt's leaf in the signed tree of its fsync group."""
        return _receipt_leaf(
            self.piece_id,
            self.node_id,
            self.serial,
            self.piece_root,
            self.piece_bytes,
            self.stored_s,
        )


@dataclass(frozen=True, slots=True)
class ReceiptDraft:
    """A receipt before its fsync group is signed."""

    piece_id: PieceID
    serial: SerialNumber
    piece_root: Hash
    piece_bytes: int


def _receipt_leaf(
    piece_id: bytes, node_id: bytes, serial: bytes, root: bytes, size: int, stored_s: int
) -> Hash:
    data = _RECEIPT.pack(1, piece_id, node_id, serial, root, size, stored_s)
    return merkle.hash_in_context(_RECEIPT_CONTEXT, data)


def sign_receipts(
    identity: Identity, drafts: Sequence[ReceiptDraft], stored_s: int
) -> list[Receipt]:
    """One signature for one fsync group, a receipt per draft in the same order."""
    leaves = [
        _receipt_leaf(
            draft.piece_id,
            identity.id,
            draft.serial,
            draft.piece_root,
            draft.piece_bytes,
            stored_s,
        )
        for draft in drafts
    ]
    proofs = _sign_leaves(identity.sign, _RECEIPTS_PREFIX, leaves)
    return [
        Receipt(
            draft.piece_id,
            identity.id,
            draft.serial,
            draft.piece_root,
            draft.piece_bytes,
            stored_s,
            proof,
        )
        for draft, proof in zip(drafts, proofs, strict=True)
    ]


def verify_receipt(
    receipt: Receipt, limit: OrderLimit, piece_root: Hash, piece_bytes: int, node_key: bytes
) -> None:
    """Raise OrderRefused unless the node signed for exactly this piece under this limit."""
    expected = (limit.piece_id, limit.node_id, limit.serial, piece_root, piece_bytes)
    named = (
        receipt.piece_id,
        receipt.node_id,
        receipt.serial,
        receipt.piece_root,
        receipt.piece_bytes,
    )
    if named != expected:
        raise OrderRefused("receipt names another piece")
    _verify_leaf(_RECEIPTS_PREFIX, receipt.leaf(), receipt.proof, node_key)


def derive_piece_id(segment_secret: bytes, node_id: NodeID, index: int) -> PieceID:
    """The piece's name at one node; only the holder of the segment secret can match two."""
    hasher = blake3(derive_key_context=_PIECE_ID_CONTEXT)
    hasher.update(segment_secret)
    hasher.update(node_id)
    hasher.update(index.to_bytes(2, "big"))
    return PieceID(hasher.digest())

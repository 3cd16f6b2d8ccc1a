"""Share hashes, piece roots and the segment root (docs/specs/segment.md, "Verified pieces").

A share's hash is plain BLAKE3 of its bytes. The piece root binds all share hashes of one index to
that index and to the piece's geometry. The segment root is the Merkle root over the piece roots
in index order; it is the only hash the satellite keeps.
"""

import struct
from collections.abc import Sequence

from blake3 import blake3

from network import merkle
from network.errors import IntegrityError
from network.ids import Hash
from network.redundancy import SegmentLayout

_PIECE_CONTEXT = "dcsfs 2026 v1 piece root"
_PIECE_LAYOUT = struct.Struct(">HHIIQ")  # index, n, share size, share count, piece length


def share_hash(share: bytes | bytearray | memoryview) -> bytes:
    """BLAKE3 of one share: 32 bytes."""
    return blake3(share).digest()


def piece_root(
    *, index: int, total: int, share_size: int, count: int, length: int, share_hashes: bytes
) -> Hash:
    """Bind `count` share hashes (32 bytes each, joined) to index, n and geometry.

    `share_size` is the size of the first share in bytes, `length` that of the whole piece.
    """
    assert len(share_hashes) == 32 * count
    head = _PIECE_LAYOUT.pack(index, total, share_size, count, length)
    return merkle.hash_in_context(_PIECE_CONTEXT, head + share_hashes)


def piece_root_in(layout: SegmentLayout, index: int, total: int, share_hashes: bytes) -> Hash:
    """The root of piece `index` of a segment with this layout."""
    return piece_root(
        index=index,
        total=total,
        share_size=layout.share_bytes(0),
        count=layout.stripes,
        length=layout.piece_bytes,
        share_hashes=share_hashes,
    )


def segment_tree(piece_roots: Sequence[Hash]) -> list[list[Hash]]:
    """Merkle levels over the piece roots in index order; the last level is the segment root."""
    return merkle.levels(piece_roots)


def verify_piece_path(
    root_of_piece: Hash, index: int, total: int, siblings: Sequence[Hash], segment_root: Hash
) -> None:
    """Raise IntegrityError unless the path leads from this piece to the segment root."""
    if merkle.root_from_path(root_of_piece, index, total, siblings) != segment_root:
        raise IntegrityError(f"piece {index} does not belong to this segment")


def verify_share(share: bytes | bytearray | memoryview, stripe: int, share_hashes: bytes) -> None:
    """Raise IntegrityError unless the share is the one that the piece root names."""
    if share_hash(share) != share_hashes[32 * stripe : 32 * stripe + 32]:
        raise IntegrityError(f"share {stripe} does not match its hash")

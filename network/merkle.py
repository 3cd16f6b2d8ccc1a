"""Binary Merkle trees over BLAKE3 (docs/specs/segment.md, "Hash trees").

Leaves are 32-byte hashes made by the caller under a context of its own. An inner node is
BLAKE3 in derive-key mode over left || right; a node without a sibling moves up unchanged. The
index and the count decide the shape of a path, so a path cannot be read at another position.
"""

from collections.abc import Sequence

from blake3 import blake3

from network.errors import IntegrityError
from network.ids import Hash

_INNER_CONTEXT = "dcsfs 2026 v1 merkle inner node"


def hash_in_context(context: str, data: bytes) -> Hash:
    """BLAKE3 in derive-key mode: equal bytes under two contexts never hash alike."""
    return Hash(blake3(data, derive_key_context=context).digest())


def _parent(left: bytes, right: bytes) -> Hash:
    return hash_in_context(_INNER_CONTEXT, left + right)


def levels(leaves: Sequence[Hash]) -> list[list[Hash]]:
    """All levels of the tree, leaves first, root level (one hash) last; at least one leaf."""
    assert leaves
    tree = [list(leaves)]
    while len(tree[-1]) > 1:
        below = tree[-1]
        level = [_parent(below[i], below[i + 1]) for i in range(0, len(below) - 1, 2)]
        if len(below) % 2:
            level.append(below[-1])
        tree.append(level)
    return tree


def root(leaves: Sequence[Hash]) -> Hash:
    """The root of the tree over `leaves`."""
    return levels(leaves)[-1][0]


def path(tree: Sequence[Sequence[Hash]], index: int) -> tuple[Hash, ...]:
    """The siblings from leaf `index` to the root of a tree made by `levels`."""
    siblings = []
    for level in tree[:-1]:
        sibling = index ^ 1
        if sibling < len(level):
            siblings.append(level[sibling])
        index //= 2
    return tuple(siblings)


def root_from_path(leaf: Hash, index: int, count: int, siblings: Sequence[Hash]) -> Hash:
    """Climb from a leaf to the root it implies; raises IntegrityError for an impossible path."""
    if not 0 <= index < count:
        raise IntegrityError(f"leaf {index} is not in a tree of {count}")
    node, position, width, used = leaf, index, count, 0
    while width > 1:
        sibling = position ^ 1
        if sibling < width:
            if used == len(siblings):
                raise IntegrityError("hash path is too short")
            other = siblings[used]
            used += 1
            node = _parent(other, node) if position % 2 else _parent(node, other)
        position //= 2
        width = (width + 1) // 2
    if used != len(siblings):
        raise IntegrityError("hash path is too long")
    return node

"""Turn a segment's bytes into verified shares, stripe by stripe, and back.

A whole 29/80 segment with all its shares is 177 MiB, so parity is made when a piece needs it and
only a window of stripes is kept; a replacement that starts late re-makes what it needs.
"""

from collections import OrderedDict
from collections.abc import Mapping

import trio

from network import merkle, piecehash
from network.erasure import code_for
from network.ids import Hash
from network.redundancy import RedundancyScheme, SegmentLayout

PARITY_STRIPES_KEPT = 9
"""About 30 MiB at 29/80; uploads run in step, so more than a frame's spread is rarely needed."""
STRIPES_AHEAD = 4


class SegmentEncoder:
    """Shares, piece roots and the segment root of one segment under upload.

    `data` must not change while the encoder is in use. Each stripe is encoded once, in 3 ms;
    tasks that want the same stripe share that work.
    """

    def __init__(self, data: memoryview, scheme: RedundancyScheme) -> None:
        self.layout = SegmentLayout(scheme.required, len(data))
        self.scheme = scheme
        self._data = data
        self._code = code_for(scheme.required, scheme.success)
        self._parity: OrderedDict[int, list[memoryview]] = OrderedDict()
        self._tail: bytes | None = None
        self._busy: dict[int, trio.Event] = {}
        self._hashes = [bytearray(32 * self.layout.stripes) for _ in range(scheme.success)]
        self._hashed: set[int] = set()
        self._tree: list[list[Hash]] | None = None
        self._wanted = 0
        self._wanted_more = trio.Event()

    def _stripe_bytes(self, stripe: int) -> bytes:
        start, end = self.layout.stripe_range(stripe)
        width = self.scheme.required * self.layout.share_bytes(stripe)
        return bytes(self._data[start:end]).ljust(width, b"\0")

    def _encode(self, stripe: int, with_hashes: bool) -> tuple[list[memoryview], list[bytes]]:
        data = self._stripe_bytes(stripe)
        parity = self._code.parity(data)
        if not with_hashes:
            return parity, []
        size = self.layout.share_bytes(stripe)
        view = memoryview(data)
        shares = [view[i * size : (i + 1) * size] for i in range(self.scheme.required)]
        return parity, [piecehash.share_hash(share) for share in (*shares, *parity)]

    async def _encoded(self, stripe: int) -> list[memoryview]:
        """The stripe's parity, encoding it if need be; cancellation leaves others waiting well."""
        while stripe not in self._parity:
            other = self._busy.get(stripe)
            if other is not None:
                await other.wait()
                continue
            done = self._busy[stripe] = trio.Event()
            try:
                # On the loop on purpose: docs/decisions/0006-crypto-on-the-loop.md.
                await trio.lowlevel.checkpoint()
                parity, hashes = self._encode(stripe, stripe not in self._hashed)
            finally:
                del self._busy[stripe]
                done.set()
            for index, digest in enumerate(hashes):
                self._hashes[index][32 * stripe : 32 * stripe + 32] = digest
            self._hashed.add(stripe)
            self._parity[stripe] = parity
            while len(self._parity) > PARITY_STRIPES_KEPT:
                self._parity.popitem(last=False)
        self._parity.move_to_end(stripe)
        return self._parity[stripe]

    async def encode_ahead(self) -> None:
        """Encode a few stripes ahead of what is asked for, while shares are being sent."""
        for stripe in range(self.layout.stripes):
            while stripe > self._wanted + STRIPES_AHEAD:
                await self._wanted_more.wait()
            if stripe not in self._hashed:
                await self._encoded(stripe)

    async def shares(self, index: int, first: int, count: int) -> list[memoryview]:
        """Shares [first, first + count) of piece `index`."""
        found = []
        if first + count > self._wanted:
            self._wanted = first + count
            self._wanted_more.set()
            self._wanted_more = trio.Event()
        for stripe in range(first, first + count):
            if index >= self.scheme.required:
                parity = self._parity.get(stripe) or await self._encoded(stripe)
                found.append(parity[index - self.scheme.required])
            else:
                if stripe not in self._hashed:
                    await self._encoded(stripe)
                found.append(self._data_share(stripe, index))
        return found

    def _data_share(self, stripe: int, index: int) -> memoryview:
        start, end = self.layout.stripe_range(stripe)
        size = self.layout.share_bytes(stripe)
        if start + (index + 1) * size <= end:
            return self._data[start + index * size : start + (index + 1) * size]
        if self._tail is None:
            self._tail = self._stripe_bytes(stripe)
        return memoryview(self._tail)[index * size : (index + 1) * size]

    async def tree(self) -> list[list[Hash]]:
        """Merkle levels over all piece roots, encoding what has not been encoded yet."""
        for stripe in range(self.layout.stripes):
            if stripe not in self._hashed:
                await self._encoded(stripe)
        if self._tree is None:
            roots = [
                piecehash.piece_root_in(self.layout, index, self.scheme.success, bytes(hashes))
                for index, hashes in enumerate(self._hashes)
            ]
            self._tree = piecehash.segment_tree(roots)
        return self._tree

    async def piece(self, index: int) -> tuple[Hash, Hash, tuple[Hash, ...]]:
        """(piece root, segment root, path) of one index."""
        tree = await self.tree()
        return tree[0][index], tree[-1][0], merkle.path(tree, index)


def decode_stripe(
    scheme: RedundancyScheme,
    layout: SegmentLayout,
    stripe: int,
    shares: Mapping[int, memoryview],
) -> memoryview:
    """The stripe's k data shares joined (padding included) from verified shares of any k indices.

    CPU-bound, about 2 ms for a full 29/80 stripe. Raises TooFewShares.
    """
    code = code_for(scheme.required, scheme.success)
    return memoryview(code.decode(shares, layout.share_bytes(stripe)))

"""The erasure code: pyeclib's `isa_l_rs_cauchy` behind raw shares.

The only module that knows pyeclib's "fragment" and its 80-byte header. `isa_l_rs_vand` is not an
option: at 29/80 about 0.4 % of 29-subsets do not decode. Callers check length and hash of every
share first: a short fragment aborts the process inside the library and a corrupt one decodes
silently to garbage.
"""

from collections.abc import Mapping
from functools import lru_cache

from pyeclib.ec_iface import ECDriver

from network.errors import TooFewShares

_HEADER_BYTES = 80


class ErasureCode:
    """k-of-n systematic code over stripes; stateless after construction, safe in any thread.

    Each call holds the interpreter lock for 2 to 3 ms: one stripe a call, a checkpoint between
    (docs/decisions/0006).
    """

    def __init__(self, required: int, total: int) -> None:
        self.required = required
        self.total = total
        self._driver = ECDriver(k=required, m=total - required, ec_type="isa_l_rs_cauchy")

    def parity(self, data: bytes) -> list[memoryview]:
        """Return the n - k parity shares of a stripe of k equal shares, in index order.

        `data` must be a multiple of k bytes long.
        """
        assert data
        assert len(data) % self.required == 0
        size = len(data) // self.required
        fragments = self._driver.encode(data)
        shares = [memoryview(item)[_HEADER_BYTES:] for item in fragments[self.required :]]
        assert all(len(share) == size for share in shares)
        return shares

    def decode(self, shares: Mapping[int, bytes | memoryview], share_bytes: int) -> bytes:
        """Rebuild the k x share_bytes data bytes of a stripe from any k verified shares.

        Raises TooFewShares with fewer than k. Shares beyond k are ignored, data shares first.
        """
        if len(shares) < self.required:
            raise TooFewShares(f"{len(shares)} of {self.required} shares")
        assert all(len(share) == share_bytes for share in shares.values())
        chosen = sorted(shares)[: self.required]
        if chosen[-1] < self.required:
            return b"".join(shares[index] for index in chosen)
        headers = _headers(self.required, self.total, share_bytes)
        fragments = [headers[index] + bytes(shares[index]) for index in chosen]
        data = self._driver.decode(fragments)
        assert isinstance(data, bytes)
        assert len(data) == self.required * share_bytes
        return data


@lru_cache(maxsize=32)
def code_for(required: int, total: int) -> ErasureCode:
    """The shared code object for k of n."""
    return ErasureCode(required, total)


@lru_cache(maxsize=256)
def _headers(required: int, total: int, share_bytes: int) -> list[bytes]:
    # A header depends on geometry and index only (no payload checksum is configured), so the
    # headers of a zero stripe fit every stripe of that size; tests/network/test_erasure.py.
    zeros = code_for(required, total)._driver.encode(bytes(required * share_bytes))
    return [fragment[:_HEADER_BYTES] for fragment in zeros]

"""API keys: macaroons, an HMAC-SHA256 chain of caveats (docs/specs/grant.md, "API key").

The satellite holds a secret per head. Anyone can restrict a key offline by adding a caveat;
nobody can take one away. Caveats name whole buckets and subtree inodes, never byte prefixes.
"""

import hashlib
import hmac
from dataclasses import dataclass
from typing import Annotated, Self

from network.codec import Max, pack, unpack
from network.errors import PermissionDenied, ProtocolError, Unauthenticated
from network.limits import MACAROON_BYTES_MAX, MACAROON_CAVEATS_MAX


@dataclass(frozen=True, slots=True)
class Scope:
    """A bucket, or the subtree below one inode of it (0 for the whole bucket)."""

    bucket: Annotated[str, Max(63)]
    root_inode: int


@dataclass(frozen=True, slots=True)
class Caveat:
    """One restriction; the defaults restrict nothing."""

    disallow_reads: bool = False
    disallow_writes: bool = False
    disallow_lists: bool = False
    disallow_deletes: bool = False
    scopes: Annotated[tuple[Scope, ...], Max(64)] = ()
    """Empty: everywhere. Otherwise: only inside one of these."""
    not_before_s: int = 0
    not_after_s: int = 0
    """0: no end."""
    nonce: Annotated[bytes, Max(16)] = b""
    """Random, so that two equal restrictions can be revoked apart."""


@dataclass(frozen=True, slots=True)
class _MacaroonWire:
    version: int
    head: Annotated[bytes, Max(32)]
    caveats: Annotated[tuple[bytes, ...], Max(MACAROON_CAVEATS_MAX)]
    tail: Annotated[bytes, Max(32)]


def _hmac(key: bytes, message: bytes) -> bytes:
    return hmac.new(key, message, hashlib.sha256).digest()


@dataclass(frozen=True, slots=True)
class Macaroon:
    """Head (32 random bytes), encoded caveats, tail (the chain's last HMAC)."""

    head: bytes
    caveats: tuple[bytes, ...]
    tail: bytes

    @classmethod
    def mint(cls, head: bytes, secret: bytes) -> Self:
        """A fresh key without caveats; `head` and `secret` are 32 bytes each."""
        return cls(head, (), _hmac(secret, head))

    def restrict(self, caveat: Caveat) -> "Macaroon":
        """Add a caveat; needs no secret."""
        encoded = pack(caveat)
        return Macaroon(self.head, (*self.caveats, encoded), _hmac(self.tail, encoded))

    def verify(self, secret: bytes) -> None:
        """Raise Unauthenticated unless the chain from `secret` ends in this tail."""
        tail = _hmac(secret, self.head)
        for caveat in self.caveats:
            tail = _hmac(tail, caveat)
        if not hmac.compare_digest(tail, self.tail):
            raise Unauthenticated("API key is not valid")

    def decoded_caveats(self) -> list[Caveat]:
        """All caveats; an unreadable one is refused, never skipped."""
        try:
            return [unpack(Caveat, data) for data in self.caveats]
        except ProtocolError as error:
            raise PermissionDenied(f"API key has a caveat of a later version: {error}") from error

    def encode(self) -> bytes:
        """The serialised key."""
        return pack(_MacaroonWire(1, self.head, self.caveats, self.tail))

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parse; raises Unauthenticated."""
        if len(data) > MACAROON_BYTES_MAX:
            raise Unauthenticated("API key is too long")
        try:
            wire = unpack(_MacaroonWire, data)
        except ProtocolError as error:
            raise Unauthenticated("API key is malformed") from error
        if wire.version != 1 or len(wire.head) != 32 or len(wire.tail) != 32:
            raise Unauthenticated("API key is malformed")
        return cls(wire.head, wire.caveats, wire.tail)


def check_caveats(
    caveats: list[Caveat],
    *,
    bucket: str,
    now_s: int,
    read: bool = False,
    write: bool = False,
    list_: bool = False,
    delete: bool = False,
) -> None:
    """Raise PermissionDenied if any caveat forbids the operation on `bucket` (empty: none).

    A scope of a subtree admits its bucket here; the metadata service checks the inode.
    """
    for caveat in caveats:
        if caveat.not_before_s > now_s or 0 < caveat.not_after_s <= now_s:
            raise PermissionDenied("API key is outside the time it is valid for")
        forbidden = (
            (read and caveat.disallow_reads)
            or (write and caveat.disallow_writes)
            or (list_ and caveat.disallow_lists)
            or (delete and caveat.disallow_deletes)
        )
        if forbidden:
            raise PermissionDenied("API key does not allow this operation")
        if caveat.scopes and bucket not in {scope.bucket for scope in caveat.scopes}:
            raise PermissionDenied(f"API key does not cover bucket {bucket!r}")

"""Identifiers: fixed-length byte strings with a type each, so they cannot be mixed up."""

import base64
from typing import ClassVar, Self

from network.errors import InvalidArgument


class Id(bytes):
    """Base of all identifiers; subclasses set `SIZE` in bytes.

    The text form is unpadded lower-case base32 (RFC 4648).
    """

    SIZE: ClassVar[int] = 0

    def __new__(cls, value: bytes) -> Self:
        if len(value) != cls.SIZE:
            raise InvalidArgument(f"{cls.__name__} takes {cls.SIZE} bytes, got {len(value)}")
        return super().__new__(cls, value)

    def __str__(self) -> str:
        return base64.b32encode(self).decode().rstrip("=").lower()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text form; raises InvalidArgument."""
        padded = text.strip().upper() + "=" * (-len(text.strip()) % 8)
        try:
            return cls(base64.b32decode(padded))
        except ValueError as error:
            raise InvalidArgument(f"not a {cls.__name__}: {text!r}") from error


class NodeID(Id):
    """BLAKE3(public key || proof-of-work nonce) of a node or a satellite."""

    SIZE = 32


class PieceID(Id):
    """Names a piece at one node; derived per node, so nodes cannot match their pieces."""

    SIZE = 32


class SegmentID(Id):
    """Names a segment at its satellite."""

    SIZE = 16


class ExtentID(Id):
    """128 random bits drawn by the client when it seals an extent."""

    SIZE = 16


class SerialNumber(Id):
    """Names an order limit: expiry in big-endian seconds, then 8 random bytes."""

    SIZE = 16

    @classmethod
    def build(cls, expires_s: int, random8: bytes) -> Self:
        """Join the expiry (Unix seconds) and 8 random bytes."""
        return cls(expires_s.to_bytes(8, "big") + random8)

    @property
    def expires_s(self) -> int:
        """Unix seconds after which a node may forget this serial."""
        return int.from_bytes(self[:8], "big")


class SessionID(Id):
    """Names a client's session on a bucket."""

    SIZE = 16


class Hash(Id):
    """A BLAKE3 digest."""

    SIZE = 32


class PublicKey(Id):
    """An Ed25519 public key."""

    SIZE = 32


class Signature(Id):
    """An Ed25519 signature."""

    SIZE = 64

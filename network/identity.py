"""Who a peer is: an Ed25519 key, a proof-of-work nonce, and a certified Noise key.

Node ID = BLAKE3(public key || nonce). The certificate travels in the handshake: it shows the
public key and nonce behind an ID, and that key's signature over the X25519 key in use
(docs/specs/wire.md, "Certificate").
"""

import struct
from dataclasses import dataclass
from typing import Self

from blake3 import blake3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from network.errors import IntegrityError, InvalidArgument, OrderRefused
from network.ids import NodeID, PublicKey, Signature

_CERTIFICATE_PREFIX = b"dcsfs 2026 v1 noise static key\0"
_CERTIFICATE = struct.Struct(">B32s8s32s64s")
_IDENTITY = struct.Struct(">4sB32s8s32s")
_IDENTITY_MAGIC = b"DCSI"


def verify_signature(public_key: bytes, signature: bytes, message: bytes) -> None:
    """Raise OrderRefused unless the Ed25519 signature is good."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError) as error:
        raise OrderRefused("signature is not valid") from error


def node_id(public_key: bytes, nonce: bytes) -> NodeID:
    """BLAKE3(public key || nonce)."""
    return NodeID(blake3(public_key + nonce).digest())


def difficulty(identifier: NodeID) -> int:
    """Proof of work behind an ID: its number of trailing zero bits."""
    value = int.from_bytes(identifier, "big")
    return 256 if value == 0 else (value & -value).bit_length() - 1


@dataclass(frozen=True, slots=True)
class Certificate:
    """Public key and nonce behind a node ID, and the signature over its Noise key."""

    public_key: PublicKey
    nonce: bytes
    noise_key: bytes
    signature: Signature

    @property
    def node_id(self) -> NodeID:
        """The ID this certificate speaks for."""
        return node_id(self.public_key, self.nonce)

    def encode(self) -> bytes:
        """137 bytes: version 1, public key, nonce, Noise key, signature."""
        return _CERTIFICATE.pack(1, self.public_key, self.nonce, self.noise_key, self.signature)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parse and verify; raises IntegrityError."""
        try:
            version, public_key, nonce, noise_key, signature = _CERTIFICATE.unpack(data)
        except struct.error as error:
            raise IntegrityError("certificate has the wrong length") from error
        if version != 1:
            raise IntegrityError(f"certificate version {version} is unknown")
        try:
            verify_signature(public_key, signature, _CERTIFICATE_PREFIX + noise_key)
        except OrderRefused as error:
            raise IntegrityError("certificate signature is not valid") from error
        return cls(PublicKey(public_key), nonce, noise_key, Signature(signature))


class Identity:
    """A peer's private half: signing key, nonce, Noise key. Never leaves its host."""

    def __init__(self, signing_seed: bytes, nonce: bytes, noise_seed: bytes) -> None:
        self._signing_seed = signing_seed
        self._noise_seed = noise_seed
        self.nonce = nonce
        self._signing_key = Ed25519PrivateKey.from_private_bytes(signing_seed)
        self.noise_key = X25519PrivateKey.from_private_bytes(noise_seed)
        self.public_key = PublicKey(self._signing_key.public_key().public_bytes_raw())
        self.id = node_id(self.public_key, nonce)
        noise_public = self.noise_key.public_key().public_bytes_raw()
        self.certificate = Certificate(
            self.public_key, nonce, noise_public, self.sign(_CERTIFICATE_PREFIX + noise_public)
        )

    @classmethod
    def generate(cls, entropy64: bytes, required_difficulty: int = 0) -> Self:
        """Make an identity from 64 random bytes; tries nonces until the ID is hard enough."""
        assert len(entropy64) == 64
        identity = cls(entropy64[:32], bytes(8), entropy64[32:])
        counter = 0
        while difficulty(node_id(identity.public_key, identity.nonce)) < required_difficulty:
            counter += 1
            identity.nonce = counter.to_bytes(8, "big")
        return cls(entropy64[:32], identity.nonce, entropy64[32:])

    def sign(self, message: bytes) -> Signature:
        """Ed25519 over `message`."""
        return Signature(self._signing_key.sign(message))

    def encode(self) -> bytes:
        """The identity file: magic `DCSI`, version 1, signing seed, nonce, Noise seed."""
        return _IDENTITY.pack(_IDENTITY_MAGIC, 1, self._signing_seed, self.nonce, self._noise_seed)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read an identity file; raises InvalidArgument."""
        try:
            magic, version, seed, nonce, noise_seed = _IDENTITY.unpack(data)
        except struct.error as error:
            raise InvalidArgument("identity file has the wrong length") from error
        if magic != _IDENTITY_MAGIC or version != 1:
            raise InvalidArgument("not an identity file of version 1")
        return cls(seed, nonce, noise_seed)


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Where a peer listens and who must answer there: `<id>@host:port`."""

    id: NodeID
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.id}@{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `<id>@host:port`; raises InvalidArgument."""
        identifier, at, place = text.strip().partition("@")
        host, colon, port = place.rpartition(":")
        if not (at and colon and host and port.isdigit() and 0 < int(port) < 65536):
            raise InvalidArgument(f"address must look like ID@HOST:PORT, not {text!r}")
        return cls(NodeID.parse(identifier), host.strip("[]"), int(port))

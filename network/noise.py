"""The Noise protocol framework, revision 34, sans-IO: 25519, AESGCM, SHA256 or BLAKE2b.

Checked against the public cacophony vectors for NK, KK, IK and XX. The transport uses XX with
SHA-256 (docs/decisions/0002-transport.md). Section numbers are those of the Noise specification.
"""

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from network.errors import ProtocolError
from network.limits import TAG_BYTES

MESSAGE_BYTES_MAX = 65535
DH_BYTES = 32
REKEY_AFTER_MESSAGES = 1 << 16
"""Both directions rekey (section 11.3) after so many transport messages, at most 4 GiB."""

_NONCE_PREFIX = bytes(4)
_MAX_NONCE_AD = b"\xff" * 8


@dataclass(frozen=True, slots=True)
class Pattern:
    """A handshake pattern: pre-messages of each side, then the messages in turn."""

    name: str
    initiator_pre: tuple[str, ...]
    responder_pre: tuple[str, ...]
    messages: tuple[tuple[str, ...], ...]


NK = Pattern("NK", (), ("s",), (("e", "es"), ("e", "ee")))
KK = Pattern("KK", ("s",), ("s",), (("e", "es", "ss"), ("e", "ee", "se")))
IK = Pattern("IK", (), ("s",), (("e", "es", "s", "ss"), ("e", "ee", "se")))
XX = Pattern("XX", (), (), (("e",), ("e", "ee", "s", "es"), ("s", "se")))


class CipherState:
    """Section 5.1, with a counter per key and the automatic rekey of this transport."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._aead = AESGCM(key)
        self._counter = 0

    def _nonce(self) -> bytes:
        nonce = _NONCE_PREFIX + self._counter.to_bytes(8, "big")
        self._counter += 1
        return nonce

    def encrypt(self, associated: bytes, plaintext: bytes) -> bytes:
        """EncryptWithAd."""
        return self._aead.encrypt(self._nonce(), plaintext, associated)

    def decrypt(self, associated: bytes, ciphertext: bytes) -> bytes:
        """DecryptWithAd; raises ProtocolError."""
        try:
            return self._aead.decrypt(self._nonce(), ciphertext, associated)
        except InvalidTag as error:
            raise ProtocolError("message authentication failed") from error

    def encrypt_into(self, plaintext: bytes | memoryview, target: memoryview) -> None:
        """Encrypt one transport message into `target` (plaintext + 16 bytes), then maybe rekey."""
        self._aead.encrypt_into(self._nonce(), plaintext, None, target)
        self._maybe_rekey()

    def decrypt_into(self, ciphertext: bytes | memoryview, target: memoryview) -> None:
        """Decrypt one transport message into `target`; raises ProtocolError."""
        try:
            self._aead.decrypt_into(self._nonce(), ciphertext, None, target)
        except InvalidTag as error:
            raise ProtocolError("message authentication failed") from error
        self._maybe_rekey()

    def _maybe_rekey(self) -> None:
        if self._counter % REKEY_AFTER_MESSAGES == 0:
            self.rekey()

    def rekey(self) -> None:
        """Section 4.2 REKEY: the first 32 bytes of 32 zeros encrypted at nonce 2^64 - 1."""
        nonce = _NONCE_PREFIX + _MAX_NONCE_AD
        self._key = self._aead.encrypt(nonce, bytes(32), b"")[:32]
        self._aead = AESGCM(self._key)


class _SymmetricState:
    """Section 5.2."""

    def __init__(self, protocol_name: bytes, hash_name: str) -> None:
        self._hash_name = hash_name
        size = hashlib.new(hash_name).digest_size
        if len(protocol_name) <= size:
            self.hash = protocol_name.ljust(size, b"\0")
        else:
            self.hash = self._digest(protocol_name)
        self._chaining_key = self.hash
        self._cipher: CipherState | None = None

    def _digest(self, data: bytes) -> bytes:
        return hashlib.new(self._hash_name, data).digest()

    def _hkdf2(self, material: bytes) -> tuple[bytes, bytes]:
        temp = hmac.new(self._chaining_key, material, self._hash_name).digest()
        first = hmac.new(temp, b"\x01", self._hash_name).digest()
        second = hmac.new(temp, first + b"\x02", self._hash_name).digest()
        return first, second

    def mix_key(self, material: bytes) -> None:
        self._chaining_key, key = self._hkdf2(material)
        self._cipher = CipherState(key[:32])

    def mix_hash(self, data: bytes) -> None:
        self.hash = self._digest(self.hash + data)

    def encrypt_and_hash(self, plaintext: bytes) -> bytes:
        out = self._cipher.encrypt(self.hash, plaintext) if self._cipher else plaintext
        self.mix_hash(out)
        return out

    def decrypt_and_hash(self, ciphertext: bytes) -> bytes:
        out = self._cipher.decrypt(self.hash, ciphertext) if self._cipher else ciphertext
        self.mix_hash(ciphertext)
        return out

    @property
    def has_key(self) -> bool:
        return self._cipher is not None

    def split(self) -> tuple[CipherState, CipherState]:
        first, second = self._hkdf2(b"")
        return CipherState(first[:32]), CipherState(second[:32])


class Handshake:
    """Section 5.3: write and read the pattern's messages in turn, then `split`.

    `generate` makes ephemeral keys; tests pass fixed ones.
    """

    def __init__(
        self,
        pattern: Pattern,
        *,
        initiator: bool,
        prologue: bytes,
        static: X25519PrivateKey | None = None,
        remote_static: bytes | None = None,
        hash_name: str = "sha256",
        generate: Callable[[], X25519PrivateKey] = X25519PrivateKey.generate,
    ) -> None:
        title = {"sha256": "SHA256", "blake2b": "BLAKE2b"}[hash_name]
        name = f"Noise_{pattern.name}_25519_AESGCM_{title}".encode()
        self._symmetric = _SymmetricState(name, hash_name)
        self._symmetric.mix_hash(prologue)
        self._pattern = pattern
        self._initiator = initiator
        self._static = static
        self._ephemeral: X25519PrivateKey | None = None
        self.remote_static = remote_static
        self._remote_ephemeral: bytes | None = None
        self._generate = generate
        self._turn = 0
        for pre, own in (
            (pattern.initiator_pre, initiator),
            (pattern.responder_pre, not initiator),
        ):
            for token in pre:
                assert token == "s"
                self._symmetric.mix_hash(self._own_public() if own else self._their_public())

    def _own_public(self) -> bytes:
        assert self._static is not None
        return self._static.public_key().public_bytes_raw()

    def _their_public(self) -> bytes:
        assert self.remote_static is not None
        return self.remote_static

    @property
    def hash(self) -> bytes:
        """The handshake hash: equal on both sides, unique to this connection."""
        return self._symmetric.hash

    @property
    def finished(self) -> bool:
        """Whether all messages have been exchanged."""
        return self._turn == len(self._pattern.messages)

    def _agree(self, token: str) -> None:
        # "es" is initiator's ephemeral with responder's static; the letters swap by role.
        own_letter = token[0] if self._initiator else token[1]
        their_letter = token[1] if self._initiator else token[0]
        private = self._ephemeral if own_letter == "e" else self._static
        public = self._remote_ephemeral if their_letter == "e" else self.remote_static
        assert private is not None
        assert public is not None
        try:
            secret = private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError as error:
            raise ProtocolError("handshake key is not valid") from error
        self._symmetric.mix_key(secret)

    def write(self, payload: bytes) -> bytes:
        """Produce the next handshake message."""
        assert (self._turn % 2 == 0) == self._initiator
        assert not self.finished
        parts = []
        for token in self._pattern.messages[self._turn]:
            if token == "e":
                self._ephemeral = self._generate()
                public = self._ephemeral.public_key().public_bytes_raw()
                self._symmetric.mix_hash(public)
                parts.append(public)
            elif token == "s":
                parts.append(self._symmetric.encrypt_and_hash(self._own_public()))
            else:
                self._agree(token)
        parts.append(self._symmetric.encrypt_and_hash(payload))
        self._turn += 1
        return b"".join(parts)

    def read(self, message: bytes) -> bytes:
        """Consume the peer's next handshake message; raises ProtocolError."""
        assert (self._turn % 2 == 1) == self._initiator
        assert not self.finished
        position = 0
        for token in self._pattern.messages[self._turn]:
            if token in ("e", "s"):
                extra = TAG_BYTES if token == "s" and self._symmetric.has_key else 0
                part = message[position : position + DH_BYTES + extra]
                if len(part) != DH_BYTES + extra:
                    raise ProtocolError("handshake message is too short")
                position += len(part)
                if token == "e":
                    self._remote_ephemeral = part
                    self._symmetric.mix_hash(part)
                else:
                    self.remote_static = self._symmetric.decrypt_and_hash(part)
            else:
                self._agree(token)
        self._turn += 1
        return self._symmetric.decrypt_and_hash(message[position:])

    def split(self) -> tuple[CipherState, CipherState]:
        """(sending, receiving) transport ciphers for this side."""
        assert self.finished
        first, second = self._symmetric.split()
        return (first, second) if self._initiator else (second, first)

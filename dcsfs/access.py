"""The access grant: satellite, API key and encryption access in one text (docs/specs/grant.md)."""

import base64
import binascii
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Self

from blake3 import blake3

from dcsfs import keys
from network.codec import Max, pack, unpack
from network.errors import InvalidArgument, ProtocolError
from network.identity import PeerAddress
from network.macaroon import Caveat, Macaroon

_PREFIX = "dcs1"
_CHECKSUM_BYTES = 4
DEFAULT_MEMORY_KIB = 64 * 1024
DEFAULT_ITERATIONS = 3


@dataclass(frozen=True, slots=True)
class AccessGrant:
    """Everything a client needs. Whoever has it can do what its API key and keys allow."""

    satellite: PeerAddress
    api_key: Annotated[bytes, Max(16384)]
    passphrase_key: Annotated[bytes, Max(32)]
    salt: Annotated[bytes, Max(32)]
    memory_kib: int
    iterations: int

    def serialize(self) -> str:
        """`dcs1` and URL-safe base64 of version, fields and a 4-byte BLAKE3 checksum."""
        body = b"\x01" + pack(self)
        checksum = blake3(body).digest(length=_CHECKSUM_BYTES)
        return _PREFIX + base64.urlsafe_b64encode(body + checksum).decode().rstrip("=")

    def restrict(self, caveat: Caveat) -> "AccessGrant":
        """A grant that may do less; needs no contact with the satellite."""
        key = Macaroon.decode(self.api_key).restrict(caveat)
        return replace(self, api_key=key.encode())

    def open_bucket(self, bucket_id: bytes, wrapped_root_key: bytes) -> bytes:
        """The root key of a bucket; raises WrongPassphrase."""
        return keys.unwrap_root_key(self.passphrase_key, bucket_id, wrapped_root_key)

    @classmethod
    def from_passphrase(
        cls, satellite: PeerAddress, api_key: bytes, passphrase: bytes, salt: bytes
    ) -> Self:
        """Derive the encryption access; takes about a tenth of a second and 64 MiB."""
        key = keys.passphrase_key(passphrase, salt, DEFAULT_MEMORY_KIB, DEFAULT_ITERATIONS)
        return cls(satellite, api_key, key, salt, DEFAULT_MEMORY_KIB, DEFAULT_ITERATIONS)


def parse_access(text: str) -> AccessGrant:
    """Read a grant's text form; raises InvalidArgument."""
    text = text.strip()
    if not text.startswith(_PREFIX):
        raise InvalidArgument("this is not an access grant: it does not begin with 'dcs1'")
    encoded = text[len(_PREFIX) :]
    try:
        data = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidArgument("this access grant is damaged: it is not base64") from error
    body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if blake3(body).digest(length=_CHECKSUM_BYTES) != checksum:
        raise InvalidArgument("this access grant is damaged: its checksum does not fit")
    if body[:1] != b"\x01":
        raise InvalidArgument("this access grant is of a later version")
    try:
        grant = unpack(AccessGrant, body[1:])
    except ProtocolError as error:
        raise InvalidArgument(f"this access grant is malformed: {error}") from error
    if len(grant.passphrase_key) != keys.KEY_BYTES:
        raise InvalidArgument("this access grant is malformed: its key has the wrong length")
    return grant


def load_access(path: Path) -> AccessGrant:
    """Read a grant file; raises InvalidArgument."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"cannot read access grant {path}: {error}") from error
    return parse_access(text)

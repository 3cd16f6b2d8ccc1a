"""Keys, encrypted names, extents and seals (docs/specs/metadata.md). Pure.

Every inode has a random 256-bit key; HKDF-SHA256 derives one key per purpose from it. A dentry
carries its child's key wrapped under the parent's wrap key, bound to where it stands. Names are
AES-SIV, so that a lookup by ciphertext works; contents are AES-256-GCM in records of 64 KiB.
"""

import struct
from functools import lru_cache

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESSIV
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from network.errors import IntegrityError, InvalidArgument, NameTooLong, WrongPassphrase
from network.ids import ExtentID, Hash
from network.limits import NAME_BYTES_MAX, RECORD_BYTES, RECORD_PLAINTEXT_BYTES, TAG_BYTES
from network.messages import Attributes, Kind

KEY_BYTES = 32
CONTENT_KEY_VERSION = 1
_INFO = b"dcsfs 2026 v1 "
_VERSION = b"\x01"
_PLACE = struct.Struct(">16sQQQB")
_SEALED = struct.Struct(">B16sQQBIQQQQ32s")
_RECORD_AD = struct.Struct(">16sIB")

ARGON2_MEMORY_KIB_MIN = 64 * 1024
ARGON2_ITERATIONS_MIN = 3


def derive(key: bytes, purpose: bytes, length: int = KEY_BYTES) -> bytes:
    """HKDF-Expand-SHA256 of a uniform key."""
    return HKDFExpand(SHA256(), length, _INFO + purpose).derive(key)


def passphrase_key(passphrase: bytes, salt: bytes, memory_kib: int, iterations: int) -> bytes:
    """argon2id, 32 bytes; raises InvalidArgument below the minimum cost."""
    if memory_kib < ARGON2_MEMORY_KIB_MIN or iterations < ARGON2_ITERATIONS_MIN:
        raise InvalidArgument("passphrase hashing below the minimum cost is refused")
    if not passphrase:
        raise InvalidArgument("the passphrase is empty")
    kdf = Argon2id(
        salt=salt, length=KEY_BYTES, iterations=iterations, lanes=1, memory_cost=memory_kib
    )
    return kdf.derive(passphrase)


def wrap_root_key(passphrase_derived: bytes, bucket_id: bytes, root_key: bytes) -> bytes:
    """Wrap a bucket's root key; changing the passphrase is one rewrap."""
    key = derive(passphrase_derived, b"bucket root " + bucket_id, 64)
    return _VERSION + AESSIV(key).encrypt(root_key, [b"bucket root", bucket_id])


def unwrap_root_key(passphrase_derived: bytes, bucket_id: bytes, wrapped: bytes) -> bytes:
    """Open a bucket's root key; a tag failure is WrongPassphrase."""
    if wrapped[:1] != _VERSION:
        raise IntegrityError(f"root key has unknown version {wrapped[:1].hex()}")
    key = derive(passphrase_derived, b"bucket root " + bucket_id, 64)
    try:
        return AESSIV(key).decrypt(wrapped[1:], [b"bucket root", bucket_id])
    except InvalidTag as error:
        raise WrongPassphrase(
            "wrong passphrase: it does not open this bucket (nothing was changed)"
        ) from error


class InodeKey:
    """An inode's key and the keys derived from it, each made when first needed."""

    __slots__ = ("_cache", "secret")

    def __init__(self, secret: bytes) -> None:
        assert len(secret) == KEY_BYTES
        self.secret = secret
        self._cache: dict[str, AESSIV | bytes] = {}

    def _siv(self, purpose: str) -> AESSIV:
        found = self._cache.get(purpose)
        if found is None:
            found = self._cache[purpose] = AESSIV(derive(self.secret, purpose.encode(), 64))
        assert isinstance(found, AESSIV)
        return found

    def _key(self, purpose: str) -> bytes:
        found = self._cache.get(purpose)
        if found is None:
            found = self._cache[purpose] = derive(self.secret, purpose.encode())
        assert isinstance(found, bytes)
        return found

    @property
    def content(self) -> bytes:
        """Key from which extent keys are derived."""
        return self._key("content")

    def encrypt_name(self, name: bytes) -> bytes:
        """A child's name under this directory's name key; raises for an impossible name."""
        check_name(name)
        return _VERSION + self._siv("name").encrypt(name, [b"name"])

    def decrypt_name(self, encrypted: bytes) -> bytes:
        """Raises IntegrityError for a name that is not from this directory."""
        return self._open("name", encrypted, [b"name"], "a name in this directory")

    def wrap_child(
        self, child_key: bytes, bucket_id: bytes, place: "Place", encrypted_name: bytes
    ) -> bytes:
        """Wrap a child's key for exactly one dentry."""
        data = [b"child", place.encode(bucket_id), encrypted_name]
        return _VERSION + self._siv("wrap").encrypt(child_key, data)

    def unwrap_child(
        self, wrapped: bytes, bucket_id: bytes, place: "Place", encrypted_name: bytes
    ) -> bytes:
        """Open a dentry's key; IntegrityError if the dentry was grafted or altered."""
        data = [b"child", place.encode(bucket_id), encrypted_name]
        return self._open("wrap", wrapped, data, "a directory entry")

    def encrypt_symlink(self, inode: int, target: bytes) -> bytes:
        """Encrypt a symbolic link's target."""
        return _VERSION + self._siv("xattr").encrypt(target, [b"symlink", inode.to_bytes(8, "big")])

    def decrypt_symlink(self, inode: int, encrypted: bytes) -> bytes:
        """Raises IntegrityError."""
        data = [b"symlink", inode.to_bytes(8, "big")]
        return self._open("xattr", encrypted, data, "a symbolic link")

    def encrypt_xattr_name(self, name: bytes) -> bytes:
        """Encrypt an extended attribute's name."""
        return _VERSION + self._siv("xattr").encrypt(name, [b"xattr name"])

    def decrypt_xattr_name(self, encrypted: bytes) -> bytes:
        """Raises IntegrityError."""
        return self._open("xattr", encrypted, [b"xattr name"], "an attribute name")

    def encrypt_xattr_value(self, inode: int, encrypted_name: bytes, value: bytes) -> bytes:
        """Encrypt a value, bound to inode and name; the value may be empty."""
        data = [b"xattr value", inode.to_bytes(8, "big"), encrypted_name]
        return _VERSION + self._siv("xattr").encrypt(b"v" + value, data)

    def decrypt_xattr_value(self, inode: int, encrypted_name: bytes, encrypted: bytes) -> bytes:
        """Raises IntegrityError."""
        data = [b"xattr value", inode.to_bytes(8, "big"), encrypted_name]
        return self._open("xattr", encrypted, data, "an attribute value")[1:]

    def _open(self, purpose: str, encrypted: bytes, data: list[bytes], what: str) -> bytes:
        if encrypted[:1] != _VERSION:
            raise IntegrityError(f"{what} has unknown version {encrypted[:1].hex()}")
        try:
            return self._siv(purpose).decrypt(encrypted[1:], data)
        except (InvalidTag, ValueError) as error:
            raise IntegrityError(f"{what} does not match its key: it was altered") from error

    def seal(self, bucket_id: bytes, sealed: "Sealed") -> bytes:
        """65 bytes: version, map root, keyed BLAKE3 over what the inode must be."""
        digest = blake3(sealed.encode(bucket_id), key=self._key("seal")).digest()
        return _VERSION + sealed.map_root + digest

    def verify_seal(self, bucket_id: bytes, sealed: "Sealed", seal: bytes) -> None:
        """Raise IntegrityError unless the seal stands over exactly these values."""
        if seal != self.seal(bucket_id, sealed):
            raise IntegrityError(
                f"seal of inode {sealed.inode} is broken: its metadata was altered"
            )


class Place:
    """Where a dentry stands: what its wrapped key is bound to."""

    __slots__ = ("child", "generation", "kind", "parent")

    def __init__(self, parent: int, child: int, generation: int, kind: Kind) -> None:
        self.parent = parent
        self.child = child
        self.generation = generation
        self.kind = kind

    def encode(self, bucket_id: bytes) -> bytes:
        """The associated data, 41 bytes."""
        return _PLACE.pack(bucket_id, self.parent, self.child, self.generation, self.kind)


class Sealed:
    """What a seal covers."""

    __slots__ = ("attributes", "content_version", "generation", "inode", "kind", "map_root", "size")

    def __init__(
        self,
        inode: int,
        generation: int,
        kind: Kind,
        attributes: Attributes,
        content_version: int,
        size: int,
        map_root: bytes,
    ) -> None:
        self.inode = inode
        self.generation = generation
        self.kind = kind
        self.attributes = attributes
        self.content_version = content_version
        self.size = size
        self.map_root = map_root

    def encode(self, bucket_id: bytes) -> bytes:
        """The authenticated bytes: mode, uid, gid, version, size, map root; not times or nlink."""
        a = self.attributes
        return _SEALED.pack(
            1, bucket_id, self.inode, self.generation, self.kind, a.mode, a.uid, a.gid,
            self.content_version, self.size, self.map_root,
        )  # fmt: skip


def map_root_of(seal: bytes) -> Hash:
    """The map root a seal carries; raises IntegrityError for an unknown version."""
    if len(seal) != 65 or seal[:1] != _VERSION:
        raise IntegrityError("seal has an unknown version")
    return Hash(seal[1:33])


def check_name(name: bytes) -> None:
    """Raise unless `name` can be one component of a path."""
    if len(name) > NAME_BYTES_MAX:
        raise NameTooLong(f"a name of {len(name)} bytes is longer than {NAME_BYTES_MAX}")
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise InvalidArgument(f"{name[:40]!r} cannot be a file name")


def ciphertext_bytes(plaintext_bytes: int) -> int:
    """Length of an extent's ciphertext: 16 bytes more per record of 64 KiB."""
    return plaintext_bytes + TAG_BYTES * -(-plaintext_bytes // RECORD_PLAINTEXT_BYTES)


def plaintext_bytes(ciphertext: int) -> int:
    """The inverse of `ciphertext_bytes`; raises IntegrityError for an impossible length."""
    records = -(-ciphertext // RECORD_BYTES)
    plain = ciphertext - TAG_BYTES * records
    if plain < 1 or ciphertext_bytes(plain) != ciphertext:
        raise IntegrityError(f"an extent cannot have {ciphertext} bytes")
    return plain


@lru_cache(maxsize=1024)
def _extent_cipher(content_key: bytes, extent_id: ExtentID) -> AESGCM:
    return AESGCM(derive(content_key, b"extent " + extent_id))


def encrypt_records(
    content_key: bytes,
    extent_id: ExtentID,
    first: int,
    plaintext: memoryview,
    last: bool,
    target: memoryview,
) -> None:
    """Encrypt consecutive records from number `first` on into `target`.

    `plaintext` is whole records, except at the end when `last`; `target` is
    `ciphertext_bytes(len(plaintext))` long.
    """
    cipher = _extent_cipher(content_key, extent_id)
    record, read, written = first, 0, 0
    while read < len(plaintext):
        part = plaintext[read : read + RECORD_PLAINTEXT_BYTES]
        read += len(part)
        data = _RECORD_AD.pack(extent_id, record, last and read == len(plaintext))
        out = target[written : written + len(part) + TAG_BYTES]
        cipher.encrypt_into(record.to_bytes(12, "big"), part, data, out)
        written += len(out)
        record += 1


def decrypt_records(
    content_key: bytes,
    extent_id: ExtentID,
    first: int,
    records: int,
    ciphertext: memoryview,
    target: memoryview,
) -> None:
    """Decrypt consecutive records of an extent of `records` records; raises IntegrityError."""
    cipher = _extent_cipher(content_key, extent_id)
    record, read, written = first, 0, 0
    while read < len(ciphertext):
        part = ciphertext[read : read + RECORD_BYTES]
        read += len(part)
        data = _RECORD_AD.pack(extent_id, record, record == records - 1)
        out = target[written : written + len(part) - TAG_BYTES]
        try:
            cipher.decrypt_into(record.to_bytes(12, "big"), part, data, out)
        except (InvalidTag, ValueError) as error:
            raise IntegrityError(
                f"record {record} of extent {extent_id} does not match its key"
            ) from error
        written += len(out)
        record += 1

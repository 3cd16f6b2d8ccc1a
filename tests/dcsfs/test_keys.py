"""Keys, seals, extents, packing, grants: round trips, tampering, vectors, fuzzing."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcsfs import keys
from dcsfs.access import AccessGrant, parse_access
from dcsfs.keys import InodeKey, Place, Sealed
from dcsfs.uplink.packing import PlannedExtent, decode_directory, encode_directory, pack_extents
from network.errors import IntegrityError, InvalidArgument, NameTooLong, WrongPassphrase
from network.extentmap import Row, map_root
from network.identity import Identity, PeerAddress
from network.ids import ExtentID, Hash, NodeID, PieceID, PublicKey, SegmentID, SerialNumber
from network.limits import RECORD_BYTES, STRIPES_MAX
from network.macaroon import Caveat, Macaroon
from network.messages import Attributes, Kind
from network.orders import (
    Action,
    OrderLimit,
    ReceiptDraft,
    derive_piece_id,
    sign_limits,
    sign_order,
    sign_receipts,
)
from network.piecehash import piece_root, segment_tree

BUCKET = bytes(range(16))
KEY = InodeKey(bytes(range(32)))


@given(st.binary(min_size=1, max_size=255))
def test_names_round_trip_or_are_refused(name):
    try:
        keys.check_name(name)
    except InvalidArgument:
        assert name in (b".", b"..") or b"/" in name or b"\0" in name
        return
    encrypted = KEY.encrypt_name(name)
    assert KEY.encrypt_name(name) == encrypted
    assert KEY.decrypt_name(encrypted) == name
    assert InodeKey(b"o" * 32).encrypt_name(name) != encrypted


def test_name_longer_than_posix_allows_is_refused():
    with pytest.raises(NameTooLong):
        KEY.encrypt_name(b"x" * 256)


def test_wrapped_key_opens_only_where_it_belongs():
    place = Place(1, 2, 1, Kind.FILE)
    name = KEY.encrypt_name(b"a")
    wrapped = KEY.wrap_child(b"c" * 32, BUCKET, place, name)
    assert KEY.unwrap_child(wrapped, BUCKET, place, name) == b"c" * 32
    others = [
        (BUCKET, Place(3, 2, 1, Kind.FILE), name),
        (BUCKET, Place(1, 3, 1, Kind.FILE), name),
        (BUCKET, Place(1, 2, 2, Kind.FILE), name),
        (BUCKET, Place(1, 2, 1, Kind.DIRECTORY), name),
        (BUCKET, place, KEY.encrypt_name(b"b")),
        (bytes(16), place, name),
    ]
    for bucket, where, encrypted in others:
        with pytest.raises(IntegrityError):
            KEY.unwrap_child(wrapped, bucket, where, encrypted)


def sealed(**changes):
    values = {
        "inode": 5, "generation": 1, "kind": Kind.FILE,
        "attributes": Attributes(0o644, 1, 2, 3, 4, 5),
        "content_version": 7, "size": 100, "map_root": bytes(32),
    }  # fmt: skip
    return Sealed(**(values | changes))


def test_seal_covers_every_field_it_promises():
    seal = KEY.seal(BUCKET, sealed())
    KEY.verify_seal(BUCKET, sealed(), seal)
    KEY.verify_seal(BUCKET, sealed(attributes=Attributes(0o644, 1, 2, 9, 9, 9)), seal)
    for change in (
        {"inode": 6}, {"generation": 2}, {"kind": Kind.SYMLINK}, {"content_version": 8},
        {"size": 99}, {"map_root": b"x" * 32},
        {"attributes": Attributes(0o755, 1, 2, 3, 4, 5)},
        {"attributes": Attributes(0o644, 0, 2, 3, 4, 5)},
        {"attributes": Attributes(0o644, 1, 0, 3, 4, 5)},
    ):  # fmt: skip
        with pytest.raises(IntegrityError):
            KEY.verify_seal(BUCKET, sealed(**change), seal)


@pytest.mark.parametrize("size", [1, 65535, 65536, 65537, 200_000])
def test_extent_round_trip_and_tampering(size):
    plain, extent = os.urandom(size), ExtentID(os.urandom(16))
    target = bytearray(keys.ciphertext_bytes(size))
    keys.encrypt_records(KEY.content, extent, 0, memoryview(plain), True, memoryview(target))
    records = -(-len(target) // RECORD_BYTES)
    assert keys.plaintext_bytes(len(target)) == size

    def decrypt(data, identifier=extent, first=0, count=records):
        out = bytearray(len(data) - 16 * -(-len(data) // RECORD_BYTES))
        keys.decrypt_records(
            KEY.content, identifier, first, count, memoryview(data), memoryview(out)
        )
        return bytes(out)

    assert decrypt(target) == plain
    flipped = bytearray(target)
    flipped[-1] ^= 1
    with pytest.raises(IntegrityError):
        decrypt(flipped)
    with pytest.raises(IntegrityError):
        decrypt(target, ExtentID(bytes(16)))
    with pytest.raises(IntegrityError):
        decrypt(target, first=1, count=records + 1)
    if records > 1:  # cut at a record border: the last flag is missing
        with pytest.raises(IntegrityError):
            decrypt(target[:RECORD_BYTES], count=1)


@given(st.lists(st.integers(1, 3_000_000), min_size=1, max_size=40), st.integers(2, 29))
def test_packing_places_everything_once_and_aligns_large_extents(sizes, k):
    limit = STRIPES_MAX * k * RECORD_BYTES
    extents = [
        PlannedExtent(ExtentID(n.to_bytes(16, "big")), n, 1, 0, size, bytes(32))
        for n, size in enumerate(sizes)
    ]
    segments = pack_extents(extents, limit)
    placed = [item for segment in segments for item in segment.extents]
    assert sorted(e.inode for e, _ in placed) == list(range(len(sizes)))
    for segment in segments:
        assert segment.size <= limit
        end = 0
        for extent, offset in sorted(segment.extents, key=lambda item: item[1]):
            assert offset >= end
            end = offset + extent.ciphertext_bytes
            if extent.length >= 65536:
                assert offset % RECORD_BYTES == 0
        assert end <= segment.size
        segment_id = SegmentID(bytes(16))
        tail = encode_directory(bytes(32), 1, segment_id, segment)
        assert end + len(tail) == segment.size
        entries = decode_directory(bytes(32), segment_id, b"before" + tail)
        assert {(e.extent_id, e.offset) for e in entries} == {
            (e.extent_id, o) for e, o in segment.extents
        }
        with pytest.raises(IntegrityError):
            decode_directory(b"x" * 32, segment_id, tail)


def test_wrong_passphrase_does_not_open_the_root():
    wrapped = keys.wrap_root_key(b"p" * 32, BUCKET, b"r" * 32)
    assert keys.unwrap_root_key(b"p" * 32, BUCKET, wrapped) == b"r" * 32
    with pytest.raises(WrongPassphrase):
        keys.unwrap_root_key(b"q" * 32, BUCKET, wrapped)
    with pytest.raises(InvalidArgument):
        keys.passphrase_key(b"x", b"s" * 16, 1024, 1)


GRANT = AccessGrant(
    PeerAddress(NodeID(bytes(range(32))), "127.0.0.1", 7777),
    Macaroon.mint(bytes(32), b"s" * 32).encode(), b"p" * 32, b"s" * 16, 65536, 3,
)  # fmt: skip


def test_grant_round_trip_and_restriction():
    assert parse_access(GRANT.serialize()) == GRANT
    restricted = parse_access(GRANT.restrict(Caveat(disallow_writes=True)).serialize())
    key = Macaroon.decode(restricted.api_key)
    key.verify(b"s" * 32)
    assert key.decoded_caveats()[0].disallow_writes


@given(st.one_of(st.text(max_size=200), st.binary(max_size=100).map(lambda b: f"dcs1{b.hex()}")))
def test_grant_garbage_is_invalid(text):
    with pytest.raises(InvalidArgument):
        parse_access(text)


@given(st.integers(4, 400), st.integers(0, 255))
def test_grant_with_a_damaged_character_is_invalid(position, replacement):
    text = list(GRANT.serialize())
    position %= len(text)
    if text[position] == chr(replacement) or position == len(text) - 1:
        return
    text[position] = chr(replacement)
    with pytest.raises(InvalidArgument):
        parse_access("".join(text))


def format_vectors():
    """Every signed or stored format on fixed inputs; compared with tests/vectors/formats.json."""
    identity = Identity(bytes(range(32)), bytes(8), bytes(range(32, 64)))
    limit = OrderLimit(
        Action.PUT, SerialNumber.build(2_000_000_000, b"8 random"), identity.id, identity.id,
        PieceID(b"p" * 32), PublicKey(b"u" * 32), 1 << 20, 1_700_000_000, 2_000_000_000, 0,
    )  # fmt: skip
    extent = ExtentID(bytes(range(16)))
    sealed_extent = bytearray(keys.ciphertext_bytes(100))
    keys.encrypt_records(
        KEY.content, extent, 0, memoryview(b"x" * 100), True, memoryview(sealed_extent)
    )
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    order = sign_order(Ed25519PrivateKey.from_private_bytes(b"o" * 32), limit.serial, 4096)
    draft = ReceiptDraft(limit.piece_id, limit.serial, Hash(b"r" * 32), 4096)
    roots = [
        piece_root(index=i, total=5, share_size=10, count=2, length=15, share_hashes=bytes(64))
        for i in range(5)
    ]
    name = KEY.encrypt_name(b"holiday.jpg")
    Macaroon.mint(bytes(32), b"s" * 32).restrict(Caveat(disallow_reads=True))
    found = {
        "node id": identity.id,
        "identity file": identity.encode(),
        "certificate": identity.certificate.encode(),
        "order limit": limit.encode(),
        "order limit signature": sign_limits(identity, [limit, limit])[1].signature,
        "order signature": order.signature,
        "receipt signature": sign_receipts(identity, [draft], 1_700_000_000)[0].proof.signature,
        "piece id": derive_piece_id(b"s" * 32, identity.id, 0),
        "piece root": roots[1],
        "segment root of 5": segment_tree(roots)[-1][0],
        "map root": map_root([Row(0, 100, extent, 0, 1), Row(1 << 26, 5, extent, 9, 1)]),
        "passphrase key": keys.passphrase_key(b"correct horse", b"s" * 16, 65536, 3),
        "wrapped root key": keys.wrap_root_key(b"p" * 32, BUCKET, b"r" * 32),
        "encrypted name": name,
        "wrapped key": KEY.wrap_child(b"c" * 32, BUCKET, Place(1, 2, 1, Kind.FILE), name),
        "symlink": KEY.encrypt_symlink(2, b"target"),
        "xattr value": KEY.encrypt_xattr_value(2, b"name", b"value"),
        "seal": KEY.seal(BUCKET, sealed()),
        "sealed extent": bytes(sealed_extent),
        "macaroon": Macaroon.mint(bytes(32), b"s" * 32)
        .restrict(Caveat(disallow_reads=True))
        .encode(),
        "access grant": GRANT.serialize().encode(),
    }
    return {name: bytes(value).hex() for name, value in found.items()}


def test_formats_are_what_they_were():
    path = Path(__file__).parents[1] / "vectors" / "formats.json"
    assert format_vectors() == json.loads(path.read_text())

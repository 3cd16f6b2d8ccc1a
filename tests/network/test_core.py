"""Codec, Merkle trees, redundancy arithmetic, erasure code, macaroons, units."""

import contextlib
import itertools
import os
from dataclasses import dataclass
from typing import Annotated

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from network import merkle, messages, piecemessages
from network.codec import Max, pack, unpack
from network.erasure import code_for
from network.errors import (
    DcsError,
    DeadlineExceeded,
    IntegrityError,
    InvalidArgument,
    PermissionDenied,
    ProtocolError,
    TooFewShares,
    Unauthenticated,
    error_from_wire,
)
from network.ids import Hash, NodeID
from network.limits import RECORD_BYTES
from network.macaroon import Caveat, Macaroon, Scope, check_caveats
from network.redundancy import DEFAULT_SCHEME, RedundancyScheme, SegmentLayout
from network.runtime import ProgressDeadline
from network.units import GiB, format_size, parse_size


@dataclass(frozen=True, slots=True)
class _Sample:
    number: int
    name: Annotated[str, Max(5)]
    items: Annotated[tuple[Hash, ...], Max(2)]
    maybe: bytes | None


def test_codec_round_trip_keeps_types():
    sample = _Sample(-5, "abc", (Hash(bytes(32)),), None)
    again = unpack(_Sample, pack(sample))
    assert again == sample
    assert type(again.items[0]) is Hash


@pytest.mark.parametrize(
    "bad",
    [
        _Sample(1, "abcdef", (), None),
        _Sample(1, "a", (Hash(bytes(32)),) * 3, None),
        _Sample(1, "a", (b"short",), None),  # type: ignore[arg-type]  # what a peer might send
        _Sample("1", "a", (), None),  # type: ignore[arg-type]  # what a peer might send
        _Sample(True, "a", (), None),
        _Sample(2**63, "a", (), None),
    ],
)
def test_codec_field_out_of_bounds_is_protocol_error(bad):
    with pytest.raises(ProtocolError):
        unpack(_Sample, pack(bad))


@given(st.binary(max_size=300))
def test_codec_any_bytes_decode_or_raise_protocol_error(data):
    for cls in (
        messages.ApplyRequest,
        piecemessages.PutPieceRequest,
        messages.SegmentGrant,
        messages.ListResponse,
        _Sample,
    ):
        with contextlib.suppress(ProtocolError):
            unpack(cls, data)


def test_error_numbers_are_unique_and_survive_the_wire():
    seen = {}
    stack = [DcsError]
    while stack:
        cls = stack.pop()
        assert cls.code not in seen, (cls, seen[cls.code])
        seen[cls.code] = cls
        stack += cls.__subclasses__()
        assert type(error_from_wire(cls.code, "x")) is cls


@given(st.integers(1, 90), st.data())
def test_merkle_path_proves_its_leaf_and_no_other(count, data):
    leaves = [Hash(bytes([i]) * 32) for i in range(count)]
    tree = merkle.levels(leaves)
    index = data.draw(st.integers(0, count - 1))
    path = merkle.path(tree, index)
    assert merkle.root_from_path(leaves[index], index, count, path) == tree[-1][0]
    other = data.draw(st.integers(0, count - 1))
    if other != index:
        with contextlib.suppress(IntegrityError):
            assert merkle.root_from_path(leaves[index], other, count, path) != tree[-1][0]


@pytest.mark.parametrize("text", ["29/35/80", "80/35/29/110", "a/b/c/d", "0/1/2/3", "5/5/5/5", ""])
def test_redundancy_malformed_is_refused(text):
    with pytest.raises(InvalidArgument):
        RedundancyScheme.parse(text)


def test_redundancy_default_has_the_settled_durability_line():
    assert RedundancyScheme.parse("29/35/80/110") == DEFAULT_SCHEME
    assert DEFAULT_SCHEME.durability_line == 54


@given(st.integers(1, 5), st.data())
def test_layout_shares_cover_exactly_the_range(k, data):
    size = data.draw(st.integers(1, 3 * k * RECORD_BYTES))
    layout = SegmentLayout(k, size)
    assert layout.piece_bytes == sum(layout.share_bytes(s) for s in range(layout.stripes))
    assert 0 <= layout.piece_bytes * k - size < k
    start = data.draw(st.integers(0, size - 1))
    end = data.draw(st.integers(start + 1, size))
    covered = []
    for stripe, index in layout.shares_of(start, end):
        base = layout.stripe_range(stripe)[0] + index * layout.share_bytes(stripe)
        covered.append((base, base + layout.share_bytes(stripe)))
    assert covered[0][0] <= start < covered[0][1]
    assert covered[-1][0] < end <= covered[-1][1]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(covered))


@pytest.mark.parametrize(("k", "n"), [(4, 8), (29, 80), (1, 3), (2, 3)])
@pytest.mark.parametrize("share", [1, 7, 4097])
def test_erasure_any_k_shares_rebuild(k, n, share):
    data = os.urandom(k * share)
    code = code_for(k, n)
    view = memoryview(data)
    shares = {i: view[i * share : (i + 1) * share] for i in range(k)}
    shares |= dict(enumerate(code.parity(data), start=k))
    assert len(shares) == n
    for seed in range(12):
        chosen = sorted(range(n), key=lambda i: hash((seed, i * 7919)) % 1009)[:k]
        assert code.decode({i: shares[i] for i in chosen}, share) == data
    assert code.decode({i: shares[i] for i in range(n - k, n)}, share) == data
    with pytest.raises(TooFewShares):
        code.decode({i: shares[i] for i in range(k - 1)}, share)


def test_macaroon_restrictions_only_add_up():
    secret, head = b"s" * 32, b"h" * 32
    key = Macaroon.mint(head, secret)
    key.verify(secret)
    reader = key.restrict(Caveat(disallow_writes=True, scopes=(Scope("photos", 0),)))
    reader = Macaroon.decode(reader.encode())
    reader.verify(secret)
    caveats = reader.decoded_caveats()
    check_caveats(caveats, bucket="photos", now_s=5, read=True)
    with pytest.raises(PermissionDenied):
        check_caveats(caveats, bucket="photos", now_s=5, write=True)
    with pytest.raises(PermissionDenied):
        check_caveats(caveats, bucket="photos2", now_s=5, read=True)
    with pytest.raises(Unauthenticated):
        Macaroon(reader.head, reader.caveats[:0], reader.tail).verify(secret)
    with pytest.raises(Unauthenticated):
        key.verify(b"t" * 32)


@given(st.binary(max_size=200))
def test_macaroon_garbage_is_unauthenticated(data):
    with pytest.raises(Unauthenticated):
        Macaroon.decode(data).verify(b"s" * 32)


def test_macaroon_matches_its_vector():
    key = Macaroon.mint(bytes(range(32)), bytes(32)).restrict(Caveat(disallow_deletes=True))
    assert key.tail.hex() == "673c3f366e6ca5a7e81b6ee10df992198418329d26938af4733e04e19a5950fb"


def test_sizes_parse_and_print():
    assert parse_size("10GiB") == 10 * GiB
    assert parse_size("1.5k") == 1536
    assert parse_size("7") == 7
    assert format_size(1536) == "1.5 KiB"
    for bad in ("", "x", "-1", "10 parsecs", "1e9"):
        with pytest.raises(InvalidArgument):
            parse_size(bad)


@given(st.binary(min_size=0, max_size=70))
def test_ids_text_form_round_trips(data):
    if len(data) == 32:
        assert NodeID.parse(str(NodeID(data))) == data
    else:
        with pytest.raises(InvalidArgument):
            NodeID(data)


async def test_progress_deadline_ends_a_transfer_that_stands_still(autojump_clock):
    with pytest.raises(DeadlineExceeded, match="sending took longer than 10 s"):
        with ProgressDeadline(10, "sending") as progress:
            for _ in range(5):
                await trio.sleep(8)
                progress.step()
            await trio.sleep(11)
    assert 50 <= trio.current_time() < 51
    with trio.move_on_after(1) as outer, ProgressDeadline(10, "sending"):
        await trio.sleep_forever()
    assert outer.cancelled_caught

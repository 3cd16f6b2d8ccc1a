"""The piece store: a model over restarts and torn tails, capacity, serials, deletion."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from network.errors import LimitExceeded, NodeFull, NotFound, OrderRefused
from network.ids import Hash, NodeID, PieceID, PublicKey, SerialNumber, Signature
from network.orders import Action, Order, OrderLimit
from node.store import PieceRecord, PieceStore

EXPIRES = 2_000_000_000


def limit_for(number, byte_limit=1 << 20, action=Action.PUT):
    name = number.to_bytes(32, "big")
    serial = SerialNumber.build(EXPIRES, number.to_bytes(8, "big"))
    return OrderLimit(
        action, serial, NodeID(bytes(32)), NodeID(bytes(32)), PieceID(name),
        PublicKey(bytes(32)), byte_limit, 0, EXPIRES, 0,
    )  # fmt: skip


def order_for(limit, amount):
    return Order(limit.serial, amount, Signature(bytes(64)))


def put(store, number, data, sync=True):
    limit = limit_for(number)
    region = store.begin_put(limit, len(data), 1)
    store.write(region, 0, memoryview(data))
    record = PieceRecord(
        limit.piece_id, 0, 80, len(data), 1, len(data), Hash(bytes(32)), bytes(32), (), 0,
        limit, order_for(limit, len(data)),
    )  # fmt: skip
    store.end_put(region, record)
    if sync:
        store.sync({region.file})
        store.publish([(region, record)])
    return limit.piece_id


def read(store, piece_id):
    region, record = store.open_piece(piece_id)
    target = memoryview(bytearray(record.piece_bytes))
    assert store.read_into(region, 0, target) == record.piece_bytes
    return bytes(target)


class StoreMachine(RuleBasedStateMachine):
    """Against a dictionary; restarts are kills, with and without a torn tail."""

    def __init__(self):
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="dcsfs-store-"))
        self.store = PieceStore(self.directory, 1 << 30)
        self.reference = {}
        self.next = 1

    @rule(size=st.integers(1, 5000))
    def put(self, size):
        data = os.urandom(size)
        self.reference[put(self.store, self.next, data)] = data
        self.next += 1

    @rule(size=st.integers(1, 5000))
    def abandon(self, size):
        region = self.store.begin_put(limit_for(self.next), size, 1)
        self.store.write(region, 0, memoryview(os.urandom(size // 2 + 1))[:size])
        self.store.end_put(region, None)
        self.next += 1

    @precondition(lambda self: self.reference)
    @rule(data=st.data())
    def delete(self, data):
        piece_id = data.draw(st.sampled_from(sorted(self.reference)))
        file = self.store.begin_delete(piece_id)
        self.store.sync({file})
        self.store.end_delete(piece_id)
        del self.reference[piece_id]

    @rule(torn=st.integers(0, 300), clean=st.booleans())
    def restart(self, torn, clean):
        if clean:
            self.store.checkpoint()
        self.store.close()
        if torn:
            newest = max((self.directory / "pieces").glob("*.log"))
            with newest.open("ab") as handle:
                handle.write(os.urandom(torn))
        self.store = PieceStore(self.directory, 1 << 30)

    @invariant()
    def same_pieces(self):
        assert self.store.pieces() == len(self.reference)
        expected = sum(len(data) + 32 for data in self.reference.values())
        assert self.store.stored_bytes == expected
        for piece_id, data in self.reference.items():
            assert read(self.store, piece_id) == data

    def teardown(self):
        self.store.close()


StoreMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestStoreModel = StoreMachine.TestCase


def test_unsynced_piece_is_found_again_only_if_its_bytes_are(tmp_path):
    store = PieceStore(tmp_path, 1 << 30)
    put(store, 1, b"a" * 100)
    piece_id = put(store, 2, b"b" * 100, sync=False)  # written, never acknowledged
    store.close()
    log = max((tmp_path / "pieces").glob("*.log"))
    with log.open("r+b") as handle:
        handle.truncate(log.stat().st_size - 40)  # the footer did not reach the disk
    store = PieceStore(tmp_path, 1 << 30)
    assert store.pieces() == 1
    with pytest.raises(NotFound):
        store.open_piece(piece_id)
    put(store, 3, b"c" * 100)
    store.close()


def test_full_node_refuses_and_keeps_what_it_has(tmp_path):
    store = PieceStore(tmp_path, 1000)
    piece_id = put(store, 1, b"a" * 500)
    with pytest.raises(NodeFull):
        store.begin_put(limit_for(2), 500, 1)
    assert read(store, piece_id) == b"a" * 500
    store.close()


def test_serial_is_refused_twice_also_after_a_restart(tmp_path):
    store = PieceStore(tmp_path, 1 << 30)
    put(store, 1, b"a")
    store.close()
    store = PieceStore(tmp_path, 1 << 30)
    with pytest.raises(OrderRefused):
        store.begin_put(limit_for(1), 1, 1)
    assert store.unsettled_orders() == 1
    store.close()


def test_get_credit_is_counted_over_requests_and_restarts(tmp_path):
    store = PieceStore(tmp_path, 1 << 30)
    limit = limit_for(9, byte_limit=100, action=Action.GET)
    store.spend(limit, order_for(limit, 100), 60)
    store.save_spent()
    store.close()
    store = PieceStore(tmp_path, 1 << 30)
    with pytest.raises(LimitExceeded):
        store.spend(limit, order_for(limit, 100), 41)
    store.spend(limit, order_for(limit, 100), 40)
    store.close()

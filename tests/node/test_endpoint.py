"""What a node refuses, and for each guard: that its test fails when the guard is off."""

import os
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from network import messages as m
from network.errors import DcsError, LimitExceeded, OrderRefused
from network.ids import NodeID, SerialNumber
from network.orders import Action, Receipt, sign_limits, sign_order, verify_receipt
from network.redundancy import RedundancyScheme
from network.rpc import ConnectionPool
from network.segment import SegmentEncoder
from network.transfer import SegmentUpload
from tests.network.test_transfer import open_bucket
from tests.planet import planet


async def grant_of(world, pool, size=5000):
    session = await open_bucket(world, pool)
    return await pool.call(
        world.address,
        m.BEGIN_SEGMENT,
        m.BeginSegmentRequest(world.api_key, session.session_id, size, ()),
    )


async def send_piece(world, pool, grant, piece, key=None, data=None):
    """Upload index 0 of a segment under one grant; returns the receipt."""
    s = grant.scheme
    scheme = RedundancyScheme(s.required, s.repair, s.success, s.total)
    encoder = SegmentEncoder(memoryview(data or os.urandom(5000)), scheme)
    upload = SegmentUpload(pool, encoder, [piece], key or grant.order_key)

    class Attempt:
        index = 0

    Attempt.grant = piece
    return await upload._send_piece(Attempt)


def resign(world, piece, **changes):
    """The same limit with changes, signed by the satellite itself."""
    limit = replace(piece.limit, **changes)
    return replace(piece, limit=limit, proof=sign_limits(world.satellite_identity, [limit])[0])


async def refusal(world, pool, grant, piece, **extra):
    try:
        await send_piece(world, pool, grant, piece, **extra)
    except DcsError as error:
        return type(error)
    return None


async def test_forged_expired_foreign_and_wrong_limits_are_refused(tmp_path, autojump_clock):
    async with planet(tmp_path) as world:
        pool = world.pool()
        grant = await grant_of(world, pool)
        pieces = iter(grant.grants)
        piece = next(pieces)
        forged = replace(piece, limit=replace(piece.limit, byte_limit=1 << 40))
        assert await refusal(world, pool, grant, forged) is OrderRefused
        past = 1_600_000_000
        expired = resign(world, piece, expires_s=past, serial=SerialNumber.build(past, bytes(8)))
        assert await refusal(world, pool, grant, expired) is OrderRefused
        foreign = resign(world, piece, node_id=NodeID(bytes(32)))
        assert await refusal(world, pool, grant, foreign) is OrderRefused
        reading = resign(world, piece, action=Action.GET)
        assert await refusal(world, pool, grant, reading) is OrderRefused
        small = resign(world, piece, byte_limit=10)
        assert await refusal(world, pool, grant, small) is LimitExceeded
        stranger = Ed25519PrivateKey.generate().private_bytes_raw()
        assert await refusal(world, pool, grant, piece, key=stranger) is OrderRefused
        assert await refusal(world, pool, grant, piece) is None
        assert await refusal(world, pool, grant, piece) is OrderRefused  # the serial is used


GUARDS = {
    "order signature": ("node.peer.verify_order", "stranger"),
    "byte limit": ("node.peer.verify_order", "small"),
    "limit signature": ("node.peer.verify_limit", "forged"),
    "serial replay": ("node.store.PieceStore._serial_used", "replay"),
}


@pytest.mark.parametrize("guard", GUARDS)
async def test_guard_switched_off_lets_its_attack_through(
    tmp_path, autojump_clock, monkeypatch, guard
):
    """Each attack of the test above succeeds without its guard, so that test would fail."""
    target, attack = GUARDS[guard]
    async with planet(tmp_path) as world:
        pool = world.pool()
        grant = await grant_of(world, pool)
        piece, key = grant.grants[0], None
        if attack == "stranger":
            key = Ed25519PrivateKey.generate().private_bytes_raw()
        elif attack == "small":
            piece = resign(world, piece, byte_limit=10)
        elif attack == "forged":
            piece = replace(piece, limit=replace(piece.limit, byte_limit=1 << 40))
        else:
            assert await refusal(world, pool, grant, piece) is None
            running = world.node_by_id(piece.limit.node_id)
            running.node.store._db.execute("DELETE FROM piece")
        assert await refusal(world, pool, grant, piece, key=key) is not None
        monkeypatch.setattr(target, lambda *args, **kwargs: None)
        assert await refusal(world, pool, grant, piece, key=key) is None


async def test_receipt_for_other_bytes_is_refused_by_the_uplink(
    tmp_path, autojump_clock, monkeypatch
):
    async with planet(tmp_path) as world:
        pool = world.pool()
        grant = await grant_of(world, pool)
        receipt = await send_piece(world, pool, grant, grant.grants[0])
        assert isinstance(receipt, Receipt)
        piece = grant.grants[0]
        with pytest.raises(OrderRefused):
            verify_receipt(receipt, piece.limit, receipt.piece_root, 17, piece.node_key)
        with pytest.raises(OrderRefused):
            verify_receipt(receipt, piece.limit, receipt.piece_root, receipt.piece_bytes, bytes(32))
        lying = world.node_by_id(grant.grants[1].limit.node_id)
        original = "node.peer.sign_receipts"

        def lie(identity, drafts, stored_s):
            from network.orders import sign_receipts

            wrong = [replace(draft, piece_bytes=draft.piece_bytes + 1) for draft in drafts]
            return sign_receipts(identity, wrong, stored_s)

        monkeypatch.setattr(original, lie)
        assert lying is not None
        assert await refusal(world, pool, grant, grant.grants[1]) is OrderRefused
        monkeypatch.setattr("network.transfer.verify_receipt", lambda *args: None)
        assert await refusal(world, pool, grant, grant.grants[2]) is None


async def test_receipt_comes_only_after_the_sync(tmp_path, autojump_clock, monkeypatch):
    async with planet(tmp_path) as world:
        pool = world.pool()
        grant = await grant_of(world, pool)
        order = []
        store = world.node_by_id(grant.grants[0].limit.node_id).node.store
        real = store.sync
        monkeypatch.setattr(store, "sync", lambda files: (order.append("sync"), real(files)))
        await send_piece(world, pool, grant, grant.grants[0])
        order.append("receipt")
        assert order == ["sync", "receipt"]


async def test_unsynced_piece_is_gone_after_a_power_cut(tmp_path, autojump_clock, monkeypatch):
    """Without fsync before the reply an acknowledged piece is lost; with it, it is not."""
    for syncs in (True, False):
        base = tmp_path / str(syncs)
        base.mkdir()
        async with planet(base) as world:
            pool = world.pool()
            grant = await grant_of(world, pool)
            running = world.node_by_id(grant.grants[0].limit.node_id)
            log = base / running.directory.name / "pieces" / "00000000.log"
            synced = [0]
            real = running.node.store.sync

            def sync(files, real=real, log=log, synced=synced, syncs=syncs):
                if syncs:
                    real(files)
                    synced[0] = log.stat().st_size

            monkeypatch.setattr(running.node.store, "sync", sync)
            await send_piece(world, pool, grant, grant.grants[0])
            world.kill_node(running)
            with log.open("r+b") as handle:  # the power cut: what was not synced is gone
                handle.truncate(synced[0])
            (running.directory / "index.db").unlink()
            from node.store import PieceStore

            again = PieceStore(running.directory, 1 << 30)
            assert again.pieces() == (1 if syncs else 0)
            again.close()


def test_pool_is_anonymous_by_default():
    assert ConnectionPool.__init__.__defaults__ == (None,)


async def test_signed_order_matches_its_limit(tmp_path, autojump_clock):
    async with planet(tmp_path, nodes=10) as world:
        pool = world.pool()
        grant = await grant_of(world, pool)
        key = Ed25519PrivateKey.from_private_bytes(grant.order_key)
        order = sign_order(key, grant.grants[0].limit.serial, 10)
        assert order.amount == 10

"""The node as a running peer: services built in order, endpoint, fsync groups, check-in."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from network import messages
from network.codec import pack, unpack
from network.errors import (
    DcsError,
    InvalidArgument,
    LimitExceeded,
    NodeFull,
    NotFound,
    OrderRefused,
    PermissionDenied,
    ProtocolError,
)
from network.identity import Identity, PeerAddress
from network.ids import PublicKey, SerialNumber
from network.limits import (
    CHECK_IN_INTERVAL_S,
    FRAME_HEADER_BYTES_NODE,
    GET_FRAME_SHARES,
    PIECE_PROGRESS_DEADLINE_S,
    PUT_FRAME_SHARES,
    RECORD_BYTES,
    STRIPES_MAX,
)
from network.messages import Empty
from network.orders import (
    Action,
    Order,
    OrderLimit,
    Receipt,
    ReceiptDraft,
    SignedRoot,
    sign_receipts,
    verify_limit,
    verify_order,
)
from network.piecehash import piece_root, share_hash, verify_piece_path
from network.piecemessages import (
    DELETE_PIECE,
    GET_PIECE,
    NODE_STATUS,
    PUT_PIECE,
    DeletePieceRequest,
    FinishPiece,
    GetPieceRequest,
    NodeStatus,
    PieceInfo,
    PutPieceRequest,
)
from network.rpc import DATA, OK, Call, ConnectionPool, Server
from network.runtime import Listener, ProgressDeadline, Runtime, now_s, with_deadline
from node.config import NodeConfig
from node.log import Region
from node.store import PieceRecord, PieceStore

log = logging.getLogger(__name__)

_VERIFIED_LIMITS_MAX = 4096
CHECK_IN_RETRY_S = 2.0
SAVE_SPENT_INTERVAL_S = 5.0
"""A crash forgets what was served since: the node's loss, and small."""


@dataclass(slots=True)
class _Finished:
    region: Region
    record: PieceRecord
    done: trio.Event
    receipt: Receipt | None = None
    error: DcsError | None = None


class SyncGroup:
    """Collects finished pieces; one fdatasync and one signature serve all that wait."""

    def __init__(self, store: PieceStore, identity: Identity, runtime: Runtime) -> None:
        self._store = store
        self._identity = identity
        self._runtime = runtime
        self._waiting: list[_Finished] = []
        self._wake = trio.Event()

    async def commit(self, region: Region, record: PieceRecord) -> Receipt:
        """Return the receipt once the piece is on disk; raises NodeFull when the disk fails.

        If cancelled, the piece may be stored or not.
        """
        item = _Finished(region, record, trio.Event())
        self._waiting.append(item)
        self._wake.set()
        await item.done.wait()
        if item.error is not None:
            raise item.error
        assert item.receipt is not None
        return item.receipt

    async def run(self) -> None:
        """Serve groups until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            group, self._waiting = self._waiting, []
            if not group:
                continue
            try:
                finished = [(item.region, item.record) for item in group]
                await self._runtime.offload(self._store.sync_pieces, finished)
                self._store.publish(finished)
            except OSError as error:
                failure = NodeFull(f"this node's disk failed: {error.strerror}")
                for item in group:
                    item.error = failure
                    item.done.set()
                log.error("disk failed at sync: %s", error)
                continue
            drafts = [
                ReceiptDraft(
                    item.record.piece_id,
                    item.record.limit.serial,
                    item.record.piece_root,
                    item.record.piece_bytes,
                )
                for item in group
            ]
            receipts = sign_receipts(self._identity, drafts, now_s(self._runtime))
            for item, receipt in zip(group, receipts, strict=True):
                item.receipt = receipt
                item.done.set()


class Node:
    """One storage node. Build it, then `run` it once."""

    def __init__(
        self, directory: Path, config: NodeConfig, identity: Identity, runtime: Runtime
    ) -> None:
        self.identity = identity
        self.config = config
        self._runtime = runtime
        self._satellite = PeerAddress.parse(config.satellite)
        self._satellite_key: PublicKey | None = None
        self.store = PieceStore(directory, config.capacity_bytes)
        self._group = SyncGroup(self.store, identity, runtime)
        self._pool = ConnectionPool(runtime, identity)
        self._verified: dict[OrderLimit, SignedRoot] = {}
        self._verified_orders: dict[SerialNumber, Order] = {}
        """Orders of GET limits come again and again: each is verified once."""
        self._open_serials: set[bytes] = set()
        self.served_bytes = 0
        self.received_bytes = 0
        self._server = Server(
            identity,
            {
                PUT_PIECE.code: (PUT_PIECE, self._put),
                GET_PIECE.code: (GET_PIECE, self._get),
                DELETE_PIECE.code: (DELETE_PIECE, self._delete),
                NODE_STATUS.code: (NODE_STATUS, self._status),
            },
            FRAME_HEADER_BYTES_NODE,
        )

    async def run(
        self,
        listener: Listener,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        """Serve until cancelled; a clean cancel leaves a checkpoint, `store.close` alone none.

        `on_ready` is called once the satellite has taken the first check-in.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._group.run)
            nursery.start_soon(self._check_in_forever, on_ready)
            nursery.start_soon(self._save_spent_forever)
            nursery.start_soon(self._server.serve, listener)

    async def _save_spent_forever(self) -> None:
        while True:
            await trio.sleep(SAVE_SPENT_INTERVAL_S)
            self.store.save_spent()

    def stop_cleanly(self) -> None:
        """Checkpoint and close; call after `run` has ended."""
        self.store.checkpoint()
        self.store.close()

    async def _check_in_forever(self, on_ready: Callable[[], None]) -> None:
        ready = False
        while True:
            try:
                await self.check_in()
            except DcsError as error:
                log.warning("check-in failed: %s", error)
                await trio.sleep(CHECK_IN_RETRY_S)
                continue
            if not ready:
                ready = True
                on_ready()
            await trio.sleep(CHECK_IN_INTERVAL_S)

    async def check_in(self) -> None:
        """Tell the satellite address and space; learn its signing key."""
        reply = await self._pool.call(
            self._satellite,
            messages.CHECK_IN,
            messages.CheckInRequest(
                self.config.listen_host,
                self.config.listen_port,
                self.config.capacity_bytes,
                self.store.stored_bytes,
                "0.1.0",
            ),
        )
        if self._satellite_key is None:
            self._satellite_key = reply.satellite_key

    def _admit(self, limit: OrderLimit, proof: SignedRoot, actions: set[Action]) -> None:
        """Raise OrderRefused unless the limit lets its holder do one of `actions` here, now."""
        if self._verified.get(limit) != proof:
            if self._satellite_key is None:
                raise OrderRefused("this node has not reached its satellite yet")
            verify_limit(
                limit,
                proof,
                satellite_id=self._satellite.id,
                satellite_key=self._satellite_key,
                node_id=self.identity.id,
                now_s=now_s(self._runtime),
            )
            if len(self._verified) >= _VERIFIED_LIMITS_MAX:
                self._verified.clear()
            self._verified[limit] = proof
        elif limit.expires_s <= now_s(self._runtime):
            raise OrderRefused("order limit has expired")
        if limit.action not in actions:
            raise OrderRefused(f"order limit is for {limit.action.name}")

    async def _put(self, call: Call[PutPieceRequest]) -> None:
        request = call.request
        self._admit(request.limit, request.proof, {Action.PUT, Action.PUT_REPAIR})
        verify_order(request.order, request.limit)
        if request.order.amount < request.piece_bytes:
            raise LimitExceeded("the order does not cover the piece")
        sizes = self._share_sizes(request)
        serial = request.limit.serial
        if serial in self._open_serials:
            raise OrderRefused("serial number is in use")
        region = self.store.begin_put(request.limit, request.piece_bytes, request.share_count)
        self._open_serials.add(serial)
        try:
            record: PieceRecord | None = None
            try:
                hashes = await self._receive_shares(call, region, sizes)
                record = await self._finish_record(call, hashes)
            finally:
                self.store.end_put(region, record)
            receipt = await self._group.commit(region, record)
        finally:
            self._open_serials.discard(serial)
        self.received_bytes += request.piece_bytes
        await with_deadline(
            PIECE_PROGRESS_DEADLINE_S,
            "sending a receipt",
            lambda: call.stream.send(OK, pack(receipt)),
        )

    @staticmethod
    def _share_sizes(request: PutPieceRequest) -> list[int]:
        size, count, total = request.share_size, request.share_count, request.piece_bytes
        if not (1 <= count <= STRIPES_MAX and 1 <= size <= RECORD_BYTES):
            raise InvalidArgument("piece geometry is out of range")
        last = total - size * (count - 1)
        if not 1 <= last <= size:
            raise InvalidArgument("piece length does not fit its shares")
        return [size] * (count - 1) + [last]

    async def _receive_shares(
        self, call: Call[PutPieceRequest], region: Region, sizes: list[int]
    ) -> bytes:
        buffer = memoryview(bytearray(PUT_FRAME_SHARES * RECORD_BYTES))
        hashes: list[bytes] = []
        written = 0
        with ProgressDeadline(PIECE_PROGRESS_DEADLINE_S * 3, "receiving shares") as progress:
            while len(hashes) < len(sizes):
                frame = await call.stream.receive(buffer)
                progress.step()
                position = 0
                while position < len(frame.body):
                    if len(hashes) == len(sizes):
                        raise ProtocolError("more shares than announced")
                    share = frame.body[position : position + sizes[len(hashes)]]
                    if len(share) != sizes[len(hashes)]:
                        raise ProtocolError("a frame must hold whole shares")
                    hashes.append(share_hash(share))
                    position += len(share)
                if frame.kind != DATA or position == 0:
                    raise ProtocolError("expected shares")
                self.store.write(region, written, frame.body)
                written += position
        return b"".join(hashes)

    async def _finish_record(self, call: Call[PutPieceRequest], hashes: bytes) -> PieceRecord:
        request = call.request
        frame = await with_deadline(
            PIECE_PROGRESS_DEADLINE_S * 3, "receiving the piece root", call.stream.receive
        )
        finish = unpack(FinishPiece, frame.header)
        if not finish.index < finish.total <= 256:
            raise ProtocolError("piece index is out of range")
        root = piece_root(
            index=finish.index,
            total=finish.total,
            share_size=request.share_size,
            count=request.share_count,
            length=request.piece_bytes,
            share_hashes=hashes,
        )
        if root != finish.piece_root:
            raise ProtocolError("received shares do not match the piece root")
        verify_piece_path(root, finish.index, finish.total, finish.path, finish.segment_root)
        return PieceRecord(
            request.limit.piece_id,
            finish.index,
            finish.total,
            request.share_size,
            request.share_count,
            request.piece_bytes,
            root,
            hashes,
            finish.path,
            request.limit.piece_expires_s,
            request.limit,
            request.order,
        )

    async def _get(self, call: Call[GetPieceRequest]) -> None:
        request = call.request
        self._admit(request.limit, request.proof, {Action.GET, Action.GET_AUDIT, Action.GET_REPAIR})
        if self._verified_orders.get(request.limit.serial) != request.order:
            verify_order(request.order, request.limit)
            if len(self._verified_orders) >= _VERIFIED_LIMITS_MAX:
                self._verified_orders.clear()
            self._verified_orders[request.limit.serial] = request.order
        region, record = self.store.open_piece(request.limit.piece_id)
        last = request.first + request.count
        if not (0 <= request.first < last <= record.share_count):
            raise InvalidArgument("shares are out of the piece's range")
        start = request.first * record.share_size
        end = min(record.piece_bytes, last * record.share_size)
        self.store.spend(request.limit, request.order, end - start)
        info = PieceInfo(
            record.index,
            record.total,
            record.share_size,
            record.share_count,
            record.piece_bytes,
            record.share_hashes,
            record.path,
        )
        step = GET_FRAME_SHARES * record.share_size
        buffer = memoryview(bytearray(min(step, end - start)))
        kind, header = OK, pack(info)
        with ProgressDeadline(PIECE_PROGRESS_DEADLINE_S, "sending shares") as progress:
            while start < end:
                target = buffer[: end - start]
                count = self.store.read_cached(region, start, target)
                if count < len(target):
                    count = await self._runtime.offload(self.store.read_into, region, start, target)
                if count < len(target):
                    raise NotFound("this node has lost the piece's bytes")
                await call.stream.send(kind, header, (target,))
                progress.step()
                kind, header = DATA, b""
                self.served_bytes += count
                start += count

    async def _delete(self, call: Call[DeletePieceRequest]) -> Empty:
        self._admit(call.request.limit, call.request.proof, {Action.DELETE})
        piece_id = call.request.limit.piece_id
        file = self.store.begin_delete(piece_id)
        if file is not None:
            await self._runtime.offload(self.store.sync, {file})
            self.store.end_delete(piece_id)
        return Empty()

    async def _status(self, call: Call[Empty]) -> NodeStatus:
        if call.peer_id != self.identity.id:
            raise PermissionDenied("only the node's own identity may ask")
        return self.status()

    def status(self) -> NodeStatus:
        """The node's own counts."""
        return NodeStatus(
            self.identity.id,
            self.config.listen_host,
            self.config.listen_port,
            self.config.capacity_bytes,
            self.store.stored_bytes,
            self.store.pieces(),
            self.store.unsettled_orders(),
            str(self._satellite),
            self.served_bytes,
            self.received_bytes,
            self.store.syncs,
        )

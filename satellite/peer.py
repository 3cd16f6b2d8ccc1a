"""The satellite as a running peer: database, services and the RPC endpoint."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from network import coherence
from network import messages as m
from network.errors import (
    IntegrityError,
    InvalidArgument,
    NotEnoughNodes,
    NotFound,
    OrderRefused,
    PermissionDenied,
)
from network.identity import Identity
from network.ids import Hash, NodeID, PublicKey, SegmentID, SerialNumber, SessionID
from network.limits import FRAME_HEADER_BYTES_MAX, ORDER_LIMIT_LIFE_S, ORDER_STEP_BYTES
from network.macaroon import Macaroon, check_caveats
from network.method import Method
from network.orders import Action, OrderLimit, derive_piece_id, sign_limits, verify_receipt
from network.redundancy import SegmentLayout
from network.rpc import Call, Handler, Server
from network.runtime import Listener, Runtime, now_s
from satellite import orphans, overlay
from satellite.config import SatelliteConfig
from satellite.db.database import Database, Transaction
from satellite.hub import Hub
from satellite.metabase import batch, buckets, dentries, extents, inodes, segments, sessions

log = logging.getLogger(__name__)
T = TypeVar("T")

RECEIPTS_CHECKED_PER_SEGMENT = 3
_GET_CREDIT_PIECES = 64
"""A GET limit lets a client read a piece so many times over before it asks again."""


class Satellite:
    """One satellite. Build it, then `run` it once; `close` at the end."""

    def __init__(
        self, config: SatelliteConfig, identity: Identity, database: Database, runtime: Runtime
    ) -> None:
        self.identity = identity
        self.config = config
        self._db = database
        self._runtime = runtime
        self._server = Server(identity, self._handlers(), FRAME_HEADER_BYTES_MAX)

    def _handlers(self) -> dict[int, tuple[Method[Any, Any], Handler]]:
        pairs: list[tuple[Method[Any, Any], Handler]] = [
            (m.PROJECT, self._project),
            (m.CREATE_BUCKET, self._create_bucket),
            (m.GET_BUCKET, self._get_bucket),
            (m.LIST_BUCKETS, self._list_buckets),
            (m.DELETE_BUCKET, self._delete_bucket),
            (m.OPEN_SESSION, self._open_session),
            (m.RENEW_SESSION, self._renew_session),
            (m.CLOSE_SESSION, self._close_session),
            (m.LOOKUP, self._lookup),
            (m.GET_INODE, self._get_inode),
            (m.LIST_DIRECTORY, self._list_directory),
            (m.FIND_PATH, self._find_path),
            (m.GET_MAP, self._get_map),
            (m.GET_XATTRS, self._get_xattrs),
            (coherence.SUBSCRIBE, self._subscribe),
            (coherence.ACQUIRE_LEASE, self._acquire_lease),
            (m.APPLY, self._apply),
            (m.BEGIN_SEGMENT, self._begin_segment),
            (m.OPEN_SEGMENTS, self._open_segments),
            (m.GET_INLINE, self._get_inline),
            (m.REPORT_NODE, self._report_node),
            (m.CHECK_IN, self._check_in),
            (m.SATELLITE_STATUS, self._status),
            (m.SET_QUOTA, self._set_quota),
        ]
        return {method.code: (method, handler) for method, handler in pairs}

    async def run(self, listener: Listener) -> None:
        """Serve until cancelled."""
        self._hub = Hub()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._db.commit_forever)
            nursery.start_soon(orphans.collect_forever, self._db, self._hub, self._runtime)
            nursery.start_soon(self._server.serve, listener)

    @property
    def _scheme(self) -> m.SchemeWire:
        scheme = self.config.scheme
        return m.SchemeWire(scheme.required, scheme.repair, scheme.success, scheme.total)

    @property
    def _now_s(self) -> int:
        return now_s(self._runtime)

    def _authorize(self, api_key: bytes, *, bucket: str = "", **actions: bool) -> int:
        """Check the key and its caveats; returns the project id."""
        macaroon = Macaroon.decode(api_key)
        row = self._db.read(lambda tx: buckets.find_key(tx, macaroon.head))
        macaroon.verify(row.secret)
        check_caveats(macaroon.decoded_caveats(), bucket=bucket, now_s=self._now_s, **actions)
        return row.project_id

    def _read_bucket(
        self, api_key: bytes, bucket: str, function: Callable[[Transaction, int], T]
    ) -> T:
        project_id = self._authorize(api_key, bucket=bucket, read=True)

        def read(tx: Transaction) -> T:
            return function(tx, buckets.get_id(tx, project_id, bucket))

        return self._db.read(read)

    async def _project(self, call: Call[m.ProjectRequest]) -> m.ProjectResponse:
        project_id = self._authorize_anywhere(call.request.api_key)
        salt, name = self._db.read(lambda tx: buckets.project_salt(tx, project_id))
        return m.ProjectResponse(salt, name)

    def _authorize_anywhere(self, api_key: bytes) -> int:
        """Check the key alone: its project is not a secret to its holder."""
        macaroon = Macaroon.decode(api_key)
        row = self._db.read(lambda tx: buckets.find_key(tx, macaroon.head))
        macaroon.verify(row.secret)
        return row.project_id

    async def _create_bucket(self, call: Call[m.CreateBucketRequest]) -> m.BucketInfo:
        request = call.request
        project_id = self._authorize(request.api_key, bucket=request.name, write=True)
        now_ns = self._runtime.now_ns()
        return await self._db.write(
            lambda tx: buckets.create(tx, project_id, request, now_ns, self._scheme)
        )

    async def _get_bucket(self, call: Call[m.BucketRequest]) -> m.BucketInfo:
        name = call.request.name
        project_id = self._authorize(call.request.api_key, bucket=name, read=True)
        return self._db.read(lambda tx: buckets.get(tx, project_id, name, self._scheme))

    async def _list_buckets(self, call: Call[m.ProjectRequest]) -> m.BucketList:
        project_id = self._authorize_anywhere(call.request.api_key)
        caveats = Macaroon.decode(call.request.api_key).decoded_caveats()

        def visible(name: str) -> bool:
            try:
                check_caveats(caveats, bucket=name, now_s=self._now_s, list_=True)
            except PermissionDenied:
                return False
            return True

        found = self._db.read(lambda tx: buckets.list_all(tx, project_id, self._scheme))
        return m.BucketList(tuple(info for info in found if visible(info.name)))

    async def _delete_bucket(self, call: Call[m.BucketRequest]) -> m.Empty:
        name = call.request.name
        project_id = self._authorize(call.request.api_key, bucket=name, delete=True)
        await self._db.write(lambda tx: buckets.delete(tx, project_id, name, self._now_s))
        return m.Empty()

    async def _open_session(self, call: Call[m.OpenSessionRequest]) -> m.SessionInfo:
        request = call.request
        project_id = self._authorize(request.api_key, bucket=request.bucket, write=True)
        if len(request.cache_id) != 16:
            raise InvalidArgument("cache id must be 16 bytes")
        new_id = SessionID(self._runtime.random_bytes(16))

        bucket_id = self._db.read(lambda tx: buckets.get_id(tx, project_id, request.bucket))

        def lease_holders(tx: Transaction) -> list[SessionID]:
            sessions.check_exclusive(tx, bucket_id, request, self._now_s)
            others = sessions.others_active(tx, bucket_id, request.cache_id, self._now_s)
            return [session_id for session_id, holds_lease in others if holds_lease]

        recalled: set[SessionID] = set()

        def write(tx: Transaction) -> m.SessionInfo | None:
            if not recalled.issuperset(lease_holders(tx)):
                return None  # somebody has opened a session since
            return sessions.open_session(tx, bucket_id, request, new_id, self._now_s)

        with self._hub.opening(bucket_id):
            while True:
                for holder in self._db.read(lease_holders):
                    await self._hub.recall(holder, lambda: not self._db.read(lease_holders))
                    recalled.add(holder)
                info = await self._db.write(write)
                if info is not None:
                    return info

    async def _renew_session(self, call: Call[m.SessionRequest]) -> m.Empty:
        project_id = self._authorize_anywhere(call.request.api_key)

        def write(tx: Transaction) -> None:
            session_id = call.request.session_id
            sessions.get(tx, project_id, session_id, self._now_s)
            sessions.renew(tx, session_id, self._now_s)

        await self._db.write(write)
        return m.Empty()

    async def _close_session(self, call: Call[m.SessionRequest]) -> m.Empty:
        project_id = self._authorize_anywhere(call.request.api_key)

        def write(tx: Transaction) -> None:
            session = sessions.get(tx, project_id, call.request.session_id, self._now_s)
            sessions.close(tx, session)

        await self._db.write(write)
        self._hub.forget(call.request.session_id)
        return m.Empty()

    async def _subscribe(self, call: Call[coherence.SubscribeRequest]) -> None:
        session_id = call.request.session_id
        project_id = self._authorize_anywhere(call.request.api_key)

        def state(tx: Transaction) -> bool:
            sessions.get(tx, project_id, session_id, self._now_s)
            return sessions.holds_lease(tx, session_id)

        async def release(reserved: Sequence[coherence.Reservation]) -> None:
            def write(tx: Transaction) -> None:
                session = sessions.get(tx, project_id, session_id, self._now_s)
                sessions.reserve(tx, session, reserved)
                sessions.release_lease(tx, session_id)

            await self._db.write(write)

        await self._hub.serve(
            session_id,
            call.stream,
            holds_lease=self._db.read(state),
            is_alone=lambda: self._db.read(
                lambda tx: sessions.is_alone(tx, session_id, self._now_s)
            ),
            on_released=release,
        )

    async def _acquire_lease(
        self, call: Call[coherence.AcquireLeaseRequest]
    ) -> coherence.AcquireLeaseResponse:
        request = call.request
        project_id = self._authorize_anywhere(request.api_key)

        def write(tx: Transaction) -> bool:
            session = sessions.get(tx, project_id, request.session_id, self._now_s)
            if self._hub.is_opening(session.bucket_id):
                return False  # the lease would be recalled at once
            return sessions.acquire_lease(tx, session, request.open_orphans, self._now_s)

        return coherence.AcquireLeaseResponse(await self._db.write(write))

    async def _lookup(self, call: Call[m.LookupRequest]) -> m.EntryRecord:
        r = call.request
        return self._read_bucket(
            r.api_key, r.bucket, lambda tx, b: dentries.lookup(tx, b, r.parent, r.name)
        )

    async def _get_inode(self, call: Call[m.InodeRequest]) -> m.InodeRecord:
        r = call.request
        return self._read_bucket(r.api_key, r.bucket, lambda tx, b: inodes.get(tx, b, r.inode))

    async def _list_directory(self, call: Call[m.ListRequest]) -> m.ListResponse:
        r = call.request
        self._authorize(r.api_key, bucket=r.bucket, list_=True)
        return self._read_bucket(
            r.api_key,
            r.bucket,
            lambda tx, b: dentries.list_page(tx, b, r.parent, r.after, r.limit),
        )

    async def _find_path(self, call: Call[m.InodeRequest]) -> m.PathResponse:
        r = call.request
        return self._read_bucket(
            r.api_key, r.bucket, lambda tx, b: dentries.find_path(tx, b, r.inode)
        )

    async def _get_map(self, call: Call[m.MapRequest]) -> m.MapResponse:
        r = call.request

        def read(tx: Transaction, bucket_id: int) -> m.MapResponse:
            record = inodes.get(tx, bucket_id, r.inode)
            rows, more = extents.load_page(tx, bucket_id, r.inode, r.after)
            placements = extents.placements_of(tx, bucket_id, rows)
            return m.MapResponse(record, tuple(rows), tuple(placements), more)

        return self._read_bucket(r.api_key, r.bucket, read)

    async def _get_xattrs(self, call: Call[m.InodeRequest]) -> m.XattrResponse:
        r = call.request

        def read(tx: Transaction, bucket_id: int) -> m.XattrResponse:
            rows = tx.all(
                "SELECT name, value FROM xattr WHERE bucket_id=? AND inode=? ORDER BY name",
                (bucket_id, r.inode),
            )
            return m.XattrResponse(tuple(m.Xattr(_blob(a), _blob(b)) for a, b in rows))

        return self._read_bucket(r.api_key, r.bucket, read)

    async def _apply(self, call: Call[m.ApplyRequest]) -> m.ApplyResponse:
        request = call.request
        project_id = self._authorize_anywhere(request.api_key)
        self._check_some_receipts(request.operations)
        has_deletes = any(isinstance(op, m.Unlink) for op in request.operations)

        def write(tx: Transaction) -> tuple[m.ApplyResponse, tuple[SessionID, ...]]:
            session = sessions.get(tx, project_id, request.session_id, self._now_s)
            row = tx.one("SELECT name FROM bucket WHERE bucket_id=?", (session.bucket_id,))
            assert row is not None
            macaroon = Macaroon.decode(request.api_key)
            check_caveats(
                macaroon.decoded_caveats(),
                bucket=str(row[0]),
                now_s=self._now_s,
                write=True,
                delete=has_deletes,
            )
            return batch.apply(tx, session, request, self._now_s), session.others

        response, others = await self._db.write(write)
        if others:
            await self._hub.publish(others, batch.changes_of(request, response))
        return response

    def _check_some_receipts(self, operations: Sequence[m.Operation]) -> None:
        """Verify a few receipts of each new segment, chosen at random; OrderRefused if bad."""
        for op in operations:
            if not isinstance(op, m.PutSegment) or not op.pieces:
                continue
            for _ in range(RECEIPTS_CHECKED_PER_SEGMENT):
                choice = int.from_bytes(self._runtime.random_bytes(4), "big") % len(op.pieces)
                receipt = op.pieces[choice].receipt
                row = self._db.read(
                    lambda tx, node=receipt.node_id: tx.one(  # type: ignore[misc]  # mypy cannot infer a lambda's default
                        "SELECT public_key FROM node WHERE node_id=?", (node,)
                    )
                )
                if row is None:
                    raise OrderRefused("a receipt is from an unknown node")
                limit = OrderLimit(
                    Action.PUT, receipt.serial, self.identity.id, receipt.node_id,
                    receipt.piece_id, PublicKey(bytes(32)), 0, 0, 0, 0,
                )  # fmt: skip
                verify_receipt(
                    receipt, limit, receipt.piece_root, receipt.piece_bytes, _blob(row[0])
                )

    async def _begin_segment(self, call: Call[m.BeginSegmentRequest]) -> m.SegmentGrant:
        request, scheme = call.request, self.config.scheme
        project_id = self._authorize_anywhere(request.api_key)
        layout = SegmentLayout(scheme.required, request.size)
        chosen = overlay.select(
            self._db.read(overlay.all_nodes),
            count=scheme.total,
            piece_bytes=layout.piece_bytes,
            avoid=frozenset(request.avoid),
            now_s=self._now_s,
            shuffle=self._shuffle,
        )
        if len(chosen) < min(scheme.durability_line, scheme.success):
            raise NotEnoughNodes(
                f"{len(chosen)} storage nodes are online with room, redundancy {scheme} needs "
                f"{scheme.durability_line}"
            )
        segment_id = SegmentID(self._runtime.random_bytes(16))
        secret = self._runtime.random_bytes(32)
        now_ns = self._runtime.now_ns()

        def write(tx: Transaction) -> None:
            session = sessions.get(tx, project_id, request.session_id, self._now_s)
            segments.offer(tx, session.bucket_id, segment_id, request.size, scheme, secret, now_ns)

        await self._db.write(write)
        return self._grant(
            Action.PUT,
            segments.StoredSegment(
                segment_id,
                request.size,
                Hash(bytes(32)),
                scheme,
                secret,
                tuple((i, node.number) for i, node in enumerate(chosen)),
            ),
            {node.number: node for node in chosen},
            layout.piece_bytes,
        )

    def _shuffle(self, items: list[overlay.KnownNode]) -> None:
        keys = self._runtime.random_bytes(8 * len(items))
        order = sorted(range(len(items)), key=lambda i: keys[8 * i : 8 * i + 8])
        items[:] = [items[i] for i in order]

    def _grant(
        self,
        action: Action,
        segment: segments.StoredSegment,
        nodes: dict[int, overlay.KnownNode],
        byte_limit: int,
    ) -> m.SegmentGrant:
        """Write and sign the order limits of one segment operation: one signature."""
        seed = self._runtime.random_bytes(32)
        key = PublicKey(Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw())
        created = self._now_s
        expires = created + ORDER_LIMIT_LIFE_S
        pairs = [(index, nodes[number]) for index, number in segment.pieces if number in nodes]
        limits = [
            OrderLimit(
                action,
                SerialNumber.build(expires, self._runtime.random_bytes(8)),
                self.identity.id,
                node.node_id,
                derive_piece_id(segment.secret, node.node_id, 0),
                key,
                byte_limit,
                created,
                expires,
                0,
            )
            for _, node in pairs
        ]
        proofs = sign_limits(self.identity, limits)
        scheme = segment.scheme
        return m.SegmentGrant(
            segment.segment_id,
            m.SchemeWire(scheme.required, scheme.repair, scheme.success, scheme.total),
            segment.size,
            segment.root,
            seed,
            tuple(
                m.PieceGrant(index, node.address, node.public_key, limit, proof)
                for (index, node), limit, proof in zip(pairs, limits, proofs, strict=True)
            ),
        )

    async def _open_segments(self, call: Call[m.OpenSegmentsRequest]) -> m.OpenSegmentsResponse:
        request = call.request

        def read(tx: Transaction, bucket_id: int) -> list[segments.StoredSegment]:
            return [segments.find(tx, bucket_id, item) for item in request.segment_ids]

        found = self._read_bucket(request.api_key, request.bucket, read)
        known = {node.number: node for node in self._db.read(overlay.all_nodes)}
        grants = []
        for segment in found:
            layout = SegmentLayout(segment.scheme.required, segment.size)
            credit = max(ORDER_STEP_BYTES, _GET_CREDIT_PIECES * layout.piece_bytes)
            nodes = self._readable(segment, known)
            grants.append(self._grant(Action.GET, segment, nodes, credit))
        return m.OpenSegmentsResponse(tuple(grants))

    def _readable(
        self, segment: segments.StoredSegment, known: dict[int, overlay.KnownNode]
    ) -> dict[int, overlay.KnownNode]:
        """The online nodes of a segment, or all of them when too few are."""
        all_of_them = {number: known[number] for _, number in segment.pieces if number in known}
        online = {n: node for n, node in all_of_them.items() if node.is_online(self._now_s)}
        enough = min(segment.scheme.success, segment.scheme.required + 6)
        return online if len(online) >= enough else all_of_them

    async def _get_inline(self, call: Call[m.InlineRequest]) -> m.InlineResponse:
        r = call.request

        def read(tx: Transaction, bucket_id: int) -> bytes:
            row = tx.one(
                "SELECT ciphertext FROM inline_extent WHERE bucket_id=? AND extent_id=?",
                (bucket_id, r.extent_id),
            )
            if row is None:
                raise NotFound(f"extent {r.extent_id} is not inline")
            return _blob(row[0])

        return m.InlineResponse(self._read_bucket(r.api_key, r.bucket, read))

    async def _report_node(self, call: Call[m.ReportNodeRequest]) -> m.Empty:
        r = call.request
        self._authorize_anywhere(r.api_key)
        await self._db.write(
            lambda tx: segments.report_bad_share(tx, r.segment_id, r.index, r.node_id, self._now_s)
        )
        return m.Empty()

    async def _check_in(self, call: Call[m.CheckInRequest]) -> m.CheckInResponse:
        certificate = call.stream.peer
        if certificate is None:
            raise PermissionDenied("a node must show its identity to check in")
        if not 0 < call.request.port < 65536 or not call.request.host:
            raise InvalidArgument("a node must have an address")
        await self._db.write(
            lambda tx: overlay.check_in(tx, certificate, call.request, self._now_s)
        )
        return m.CheckInResponse(self._now_s, self.identity.public_key)

    async def _set_quota(self, call: Call[m.SetQuotaRequest]) -> m.SetQuotaResponse:
        self._require_own_identity(call.peer_id)
        r = call.request
        used = await self._db.write(
            lambda tx: buckets.set_quota(tx, r.project, r.bucket, r.quota_bytes)
        )
        return m.SetQuotaResponse(used)

    def _require_own_identity(self, peer_id: NodeID | None) -> None:
        if peer_id != self.identity.id:
            raise PermissionDenied("only the satellite's own identity may ask")

    async def _status(self, call: Call[m.Empty]) -> m.SatelliteStatus:
        self._require_own_identity(call.peer_id)
        return self._db.read(self._status_from)

    def _status_from(self, tx: Transaction) -> m.SatelliteStatus:
        return m.SatelliteStatus(
            f"{self.identity.id}@{self.config.listen_host}:{self.config.listen_port}",
            tuple(overlay.reports(tx, self._now_s)),
            tx.number("SELECT count(*) FROM segment WHERE state=1"),
            tx.number("SELECT sum(live_bytes) FROM segment"),
            tx.number("SELECT count(*) FROM inode"),
            tx.number("SELECT sum(transactions) FROM bucket"),
        )


def _blob(value: int | str | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise IntegrityError("the database holds a value of the wrong type")
    return value

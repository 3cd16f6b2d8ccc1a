"""A mounted bucket's state: inodes, the open batch, the log, the session; and its recovery.

All changes go through `record`, `stage` and `truncate`, which write the log first and then the
state in memory, without a checkpoint in between: other tasks see both or neither.
"""

import errno
import logging
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from dcsfs.cache.clean import CleanCache
from dcsfs.cache.log import Position, WriteLog
from dcsfs.fs import journal, loader
from dcsfs.fs.errors import FsError, NotInMemory
from dcsfs.fs.state import Batch, Dentry, FrozenInode, Inode, Layer, follow
from dcsfs.keys import InodeKey
from dcsfs.uplink.client import BucketClient
from network import messages as m
from network.codec import unpack
from network.coherence import Change
from network.errors import IntegrityError, NotFound, PreconditionFailed
from network.ids import Hash, SessionID
from network.runtime import Runtime

log = logging.getLogger(__name__)

BATCH_ITEMS_MAX = 12_000
"""Operations and touched inodes at which a batch is frozen: under APPLY_OPERATIONS_MAX."""


@dataclass(slots=True)
class SessionState:
    """The session as this mount holds it."""

    session_id: SessionID
    sequence: int
    chain: Hash
    direct_sequence: int
    holds_lease: bool
    next_number: int
    last_number: int


class Volume:
    """Build with `open_volume`; see the module's docstring for who may change what."""

    def __init__(
        self,
        client: BucketClient,
        runtime: Runtime,
        clean: CleanCache,
        write_log: WriteLog | None,
        session: SessionState | None,
        *,
        keeps_clean: bool = True,
    ) -> None:
        self.client = client
        self.runtime = runtime
        self.clean = clean
        self.keeps_clean = keeps_clean
        """Whether what is read and sent goes to the clean cache on disk."""
        self._log = write_log
        self._session = session
        root = loader.root_inode(client)
        self.root = root
        self.inodes: dict[int, Inode] = {root.number: root}
        self.parted: dict[int, int] = {}
        """Kernel references to inodes that are not in memory (fs/residence.py)."""
        self.sweeps = 0
        self.open_batch = Batch()
        self.queue: deque[Batch] = deque()
        self.flush_wanted = trio.Event()
        self.on_freeze: Callable[[], None] = lambda: None
        """Tells who uploads that the queue has grown."""
        self.on_session_lost: Callable[[], None] = lambda: None
        """Tells who keeps the channel that the satellite has ended the session."""
        self.is_shared = session is not None and not session.holds_lease
        """Others may change the bucket: names are decided by the satellite (fs/shared.py)."""
        self.trusted_until = 0.0
        """While shared: until then, what is in memory is as good as the satellite's word."""
        self.is_offline = False
        """The satellite cannot be reached: what is in memory is all there is."""
        self.events_seen = 0
        """Counts changes by others, and here: an answer asked for before one may be too old."""
        self.loads = 0
        """Counts answers taken over: a change that is under way may be in one already."""
        self._replayed_sequence = 0
        """While recovering: the log record that is being replayed."""
        self._replayed_xattrs: list[journal.XattrState] = []
        self.staged_bytes = 0
        """File bytes ever staged; what overwrites staged ones is not counted again."""
        self._restated: set[int] = set()
        """While recovering: inodes whose attributes the replayed records set."""

    @property
    def is_read_only(self) -> bool:
        """Whether this mount takes no writes."""
        return self._session is None

    @property
    def log(self) -> WriteLog:
        """The write-back log; only for writable volumes."""
        assert self._log is not None
        return self._log

    @property
    def session(self) -> SessionState:
        """The session; only for writable volumes."""
        assert self._session is not None
        return self._session

    @property
    def is_trusted(self) -> bool:
        """Whether what is in memory may be answered without asking the satellite."""
        if self._session is None:
            return False
        return not self.is_shared or self.is_offline or trio.current_time() < self.trusted_until

    @property
    def has_backlog(self) -> bool:
        """Whether namespace operations made under a lease are not committed yet."""
        return bool(self.open_batch.operations or any(b.operations for b in self.queue))

    @property
    def dirty_bytes(self) -> int:
        """File bytes staged and not yet committed at the satellite."""
        return self.open_batch.data_bytes + sum(batch.data_bytes for batch in self.queue)

    @property
    def pending_operations(self) -> int:
        """Operations not yet committed at the satellite."""
        return sum(
            len(batch.operations) + len(batch.touched) for batch in (*self.queue, self.open_batch)
        )

    def pending_inodes(self) -> set[int]:
        """Inodes with changes, or names in them with changes, that are not committed yet.

        New ones are not among them: they have no seal.
        """
        return {number for batch in (*self.queue, self.open_batch) for number in batch.touched}

    def get(self, number: int) -> Inode:
        """An inode the kernel knows; NotInMemory for one that has to be loaded first."""
        inode = self.inodes.get(number)
        if inode is None or inode.is_stub:
            raise NotInMemory(number)
        inode.used = self.sweeps
        return inode

    def has(self, number: int) -> bool:
        """Whether an inode is in memory; what is asked for stays for a while (residence.py)."""
        inode = self.inodes.get(number)
        if inode is None or inode.is_stub:
            return False
        inode.used = self.sweeps
        return True

    def is_held(self, number: int) -> bool:
        """Whether this mount needs an inode that has no names any more."""
        inode = self.inodes.get(number)
        return inode is not None and bool(inode.open_count or inode.layers)

    def adopt(self, inode: Inode) -> Inode:
        """Add an inode loaded from the satellite.

        Under a lease the one in memory wins, it is newer; otherwise it takes over what was loaded.
        """
        inode.used = self.sweeps
        known = self.inodes.get(inode.number)
        if known is None:
            if inode.number in self.parted:
                inode.lookup_count = self.parted.pop(inode.number)
                inode.kernel_changes = -1  # the kernel's pages may be older than what was loaded
            self.inodes[inode.number] = inode
            return inode
        known.used = self.sweeps
        if known.is_stub:
            inode.children, inode.absent = known.children, known.absent
            inode.lookup_count = known.lookup_count
            self.inodes[inode.number] = inode
            return inode
        if self.is_read_only or self.is_shared:
            self.follow(known, inode)
        return known

    def follow(self, known: Inode, fresh: Inode) -> None:
        """Take over the satellite's record of an inode."""
        self.loads += 1
        follow(known, fresh)

    @staticmethod
    def forget_name(directory: Inode, name: bytes) -> None:
        """What a name of a directory stands for is not known any more."""
        directory.children.pop(name, None)
        directory.absent.discard(name)
        directory.unknown.add(name)

    @staticmethod
    def forget_names(directory: Inode) -> None:
        """No name of a directory is known any more."""
        directory.children.clear()
        directory.absent.clear()
        directory.unknown.clear()
        directory.is_complete = False
        directory.lookups_sent = 0

    def forget_everything(self) -> None:
        """Others may have changed anything; what is staged here stays."""
        self.events_seen += 1
        for inode in self.inodes.values():
            inode.is_stale = True
            inode.xattrs = None
            if inode.is_directory:
                inode.name_changes += 1
                self.forget_names(inode)

    def take_in(self, changes: Sequence[Change]) -> list[int]:
        """Forget what another session has changed; returns the inodes concerned."""
        self.events_seen += 1
        found = []
        for change in changes:
            inode = self.inodes.get(change.inode)
            if inode is None or inode.is_stub:
                if change.inode in self.parted:
                    found.append(change.inode)
                continue
            found.append(inode.number)
            inode.is_stale = True
            inode.xattrs = None
            if not change.name:
                continue
            inode.name_changes += 1
            try:
                self.forget_name(inode, inode.key.decrypt_name(change.name))
            except IntegrityError:
                self.forget_names(inode)
        return found

    def new_number(self) -> int:
        """A fresh number for an inode or a dentry; never reused in this bucket."""
        session = self.session
        if session.next_number >= session.last_number:
            raise FsError(errno.ENOSPC, "the inode numbers granted to this session are used up")
        session.next_number += 1
        return session.next_number - 1

    def touch(self, inode: Inode) -> None:
        """Have the open batch bring this inode's attributes up to date."""
        batch = self.open_batch
        if inode.number not in batch.touched:
            batch.touched[inode.number] = inode
            self._started(batch)

    def _started(self, batch: Batch) -> None:
        if batch.opened_at == 0.0:
            batch.opened_at = trio.current_time()
            self.flush_wanted.set()

    def record(
        self,
        operation: m.Operation | None,
        inodes: Sequence[Inode] = (),
        dentries: Sequence[journal.DentryState] = (),
        xattrs: Sequence[journal.XattrState] = (),
        touched: Sequence[Inode] = (),
    ) -> None:
        """Log a change that has been made in memory, and queue it for the satellite.

        Raises OSError when the log cannot take it: the caller must have checked for room.
        """
        assert operation is None or not self.is_shared
        states = {inode.number: journal.state_of(inode) for inode in (*inodes, *touched)}
        message = journal.OperationRecord(
            operation, tuple(states.values()), tuple(dentries), tuple(xattrs)
        )
        journal.append_message(self.log, journal.OPERATION, message)
        self._started(self.open_batch)
        if operation is not None:
            self.open_batch.operations.append(operation)
            loser = m.loses_a_name(operation)
            self.open_batch.losers |= {
                number: state.content_version for number, state in states.items() if number == loser
            }
            if isinstance(operation, m.SetXattr):
                self.open_batch.weight += len(operation.value or b"") // 1024
        for inode in touched:
            self.touch(inode)
        self._freeze_if_large()

    def _freeze_if_large(self) -> None:
        batch = self.open_batch
        if len(batch.operations) + len(batch.touched) + batch.weight >= BATCH_ITEMS_MAX:
            self.freeze()

    def _layer(self, inode: Inode) -> Layer:
        """The inode's layer in the open batch; its state is logged when it gets one."""
        assert inode.kind is m.Kind.FILE, "only files have content"
        layer = self.open_batch.layers.get(inode.number)
        if layer is None:
            while inode.number not in self.open_batch.touched:
                self.record(None, touched=(inode,))  # may freeze the batch it went to
            layer = self.open_batch.layers[inode.number] = Layer()
            inode.layers.append(layer)
        return layer

    def stage(self, inode: Inode, offset: int, data: memoryview, mtime_ns: int) -> None:
        """Write file bytes into log and state; raises OSError with nothing changed."""
        layer = self._layer(inode)
        position = journal.append_data(self.log, inode.number, offset, mtime_ns, data)
        self._apply_data(inode, layer, offset, len(data), position, mtime_ns)

    def _apply_data(
        self, inode: Inode, layer: Layer, offset: int, count: int, position: Position, now: int
    ) -> None:
        before = layer.data.total_bytes
        layer.data.insert(offset, offset + count, position, journal.DATA_HEAD.size)
        grown = layer.data.total_bytes - before
        self.open_batch.data_bytes += grown
        self.staged_bytes += grown
        layer.end = max(layer.end, offset + count)
        inode.size = max(inode.size, offset + count)
        inode.mtime_ns = inode.ctime_ns = now

    def truncate(self, inode: Inode, size: int, mtime_ns: int) -> None:
        """Cut or grow a file in log and state."""
        self._layer(inode)
        journal.append_message(
            self.log, journal.TRUNCATE, journal.TruncateRecord(inode.number, size, mtime_ns)
        )
        self._apply_truncate(inode, size, mtime_ns)

    def _apply_truncate(self, inode: Inode, size: int, mtime_ns: int) -> None:
        layer = self._layer(inode)
        if size < inode.size:
            before = layer.data.total_bytes
            layer.data.clear(size, max(inode.size, size))
            self.open_batch.data_bytes -= before - layer.data.total_bytes
            layer.cut = min(layer.cut, size)
        inode.size = layer.end = size
        inode.mtime_ns = inode.ctime_ns = mtime_ns

    def freeze(self) -> None:
        """Close the open batch: what follows belongs to the next one."""
        batch = self.open_batch
        if not batch:
            return
        for number, inode in batch.touched.items():
            dead = inode.nlink == 0 and not inode.is_in_use
            batch.frozen[number] = FrozenInode(inode.attributes, inode.size, dead)
        batch.last_sequence = self._replayed_sequence or self.log.last_sequence
        self.queue.append(batch)
        self.open_batch = Batch()
        self.on_freeze()

    async def recover(self) -> int:
        """Replay the log over the committed state; returns the number of records replayed.

        Raises PreconditionFailed when the satellite knows a batch that this log does not: the
        cache directory was copied or restored.
        """
        session = self.session
        head = journal.DATA_HEAD.size
        records = [
            (position, kind, bytes(payload[:head] if kind == journal.DATA else payload))
            for position, kind, payload in self.log.replay()
        ]
        covered, names_covered = self._covered(records, session)
        records = [item for item in records if item[0].sequence > covered]
        created = self._describe_inodes(records, names_covered)
        count = 0
        for position, kind, payload in records:
            self._replayed_sequence = position.sequence
            if kind == journal.OPERATION and position.sequence <= names_covered:
                continue
            if kind == journal.OPERATION:
                self._replay_operation(unpack(journal.OperationRecord, payload))
            elif kind == journal.DATA:
                number, offset, mtime = journal.DATA_HEAD.unpack_from(payload)
                inode = self._replayed(number)
                layer = self._replay_layer(inode)
                size = position.payload_bytes - head
                self._apply_data(inode, layer, offset, size, position, mtime)
            elif kind == journal.TRUNCATE:
                cut = unpack(journal.TruncateRecord, payload)
                inode = self._replayed(cut.inode)
                self._replay_layer(inode)
                self._apply_truncate(inode, cut.size, cut.mtime_ns)
            else:
                continue
            count += 1
        self._replayed_sequence = 0
        self._describe_again()
        await self._refresh(created)
        await self._replay_xattrs()
        self._drop_orphans()
        if self.is_shared:
            self.mark_overtaken()
        return count

    def mark_overtaken(self) -> None:
        """The lease under which all that is not committed was made has gone to another session."""
        self.freeze()
        for batch in self.queue:
            batch.is_overtaken = True

    def _describe_inodes(
        self, records: list[tuple[Position, int, bytes]], names_covered: int
    ) -> set[int]:
        """Make every inode that the log describes; returns those the satellite has not seen.

        A description may follow the data: after a split recovery it is written again at the end.
        """
        created: set[int] = set()
        described: dict[int, journal.InodeState] = {}
        for position, kind, payload in records:
            if kind != journal.OPERATION:
                continue
            record = unpack(journal.OperationRecord, payload)
            if isinstance(record.operation, m.Create) and position.sequence > names_covered:
                created.add(record.operation.inode.inode)
            for state in record.inodes:
                described.setdefault(state.number, state)
        for state in described.values():
            self._replay_inode(state, state.number in created)
        return created

    def _describe_again(self) -> None:
        """Log the inodes of all batches but the first once more.

        When the first is committed its records go, and with them descriptions that data of the
        later ones relies on.
        """
        later = [*list(self.queue)[1:], self.open_batch] if self.queue else []
        for inode in {n: i for batch in later for n, i in batch.touched.items()}.values():
            message = journal.OperationRecord(None, (journal.state_of(inode),), (), ())
            journal.append_message(self.log, journal.OPERATION, message)

    def _covered(
        self, records: list[tuple[Position, int, bytes]], session: SessionState
    ) -> tuple[int, int]:
        """(last log record the satellite has, last one whose names it has)."""
        covered = {journal.FLUSH: 0, journal.NAMES_FLUSH: 0}
        last = 0
        done = {
            unpack(journal.DoneRecord, payload)
            for _, kind, payload in records
            if kind == journal.DONE
        }
        for _, kind, payload in records:
            if kind not in covered:
                continue
            flush = unpack(journal.FlushRecord, payload)
            is_own = flush.session_id == session.session_id
            if journal.DoneRecord(flush.session_id, flush.sequence) not in done:
                if not is_own or flush.sequence > session.sequence:
                    continue
                if flush.sequence == session.sequence and flush.chain != session.chain:
                    continue
            covered[kind] = max(covered[kind], flush.covered)
            last = max(last, flush.sequence) if is_own else last
        has_records = any(kind == journal.OPERATION for _, kind, _ in records)
        if has_records and session.sequence > last and last > 0:
            raise PreconditionFailed(
                "this cache directory is an old copy: the satellite has applied batches that "
                "its log does not hold; move it away and mount with a fresh one"
            )
        return covered[journal.FLUSH], covered[journal.NAMES_FLUSH]

    def _replayed(self, number: int) -> Inode:
        inode = self.inodes.get(number)
        if inode is None:
            raise IntegrityError(f"the log writes to inode {number}, which it does not describe")
        return inode

    def _replay_layer(self, inode: Inode) -> Layer:
        batch = self.open_batch
        batch.touched.setdefault(inode.number, inode)
        self._started(batch)
        layer = batch.layers.get(inode.number)
        if layer is None:
            layer = batch.layers[inode.number] = Layer()
            inode.layers.append(layer)
        return layer

    def _replay_operation(self, record: journal.OperationRecord) -> None:
        batch = self.open_batch
        self._started(batch)
        if record.operation is not None:
            batch.operations.append(record.operation)
            loser = m.loses_a_name(record.operation)
            batch.losers |= {
                s.number: s.content_version for s in record.inodes if s.number == loser
            }
        for state in record.inodes:
            self._restated.add(state.number)
            inode = self._replay_inode(state, is_new=False)
            batch.touched[inode.number] = inode
        for entry in record.dentries:
            parent = self.inodes.get(entry.parent)
            if parent is None:
                parent = self.inodes[entry.parent] = _stub(entry.parent)
            if entry.child:
                parent.absent.discard(entry.name)
                parent.children[entry.name] = Dentry(
                    entry.dentry_id, entry.name, entry.child, entry.kind
                )
            else:
                parent.children.pop(entry.name, None)
                parent.absent.add(entry.name)
        self._replayed_xattrs += record.xattrs
        if len(batch.operations) + len(batch.touched) >= BATCH_ITEMS_MAX:
            self.freeze()

    def _replay_inode(self, state: journal.InodeState, is_new: bool) -> Inode:
        inode = self.inodes.get(state.number)
        if inode is None or inode.is_stub:
            a = state.attributes
            fresh = Inode(
                state.number, state.generation, state.kind, InodeKey(state.key), state.rdev,
                state.nlink, a.mode, a.uid, a.gid, a.atime_ns, a.mtime_ns, a.ctime_ns, state.size,
                parent=state.parent, symlink=state.symlink, content_version=state.content_version,
                committed_size=state.committed_size, allocated=state.allocated, seal=state.seal,
            )  # fmt: skip
            fresh.rows = [] if is_new else None
            fresh.xattrs = {} if is_new else None
            fresh.is_complete = is_new
            if inode is not None:
                fresh.children, fresh.absent = inode.children, inode.absent
            self.inodes[state.number] = inode = fresh
        a = state.attributes
        inode.nlink, inode.size, inode.parent = state.nlink, state.size, state.parent
        inode.mode, inode.uid, inode.gid = a.mode, a.uid, a.gid
        inode.atime_ns, inode.mtime_ns, inode.ctime_ns = a.atime_ns, a.mtime_ns, a.ctime_ns
        return inode

    async def _refresh(self, created: set[int]) -> None:
        """Learn the committed version of replayed inodes that the satellite already has."""
        for inode in list(self.inodes.values()):
            if inode.is_stub or inode.number in created or inode is self.root:
                continue
            try:
                record = await self.client.call(
                    m.GET_INODE,
                    m.InodeRequest(self.client.api_key, self.client.bucket, inode.number),
                )
            except NotFound:
                if not (self.is_shared and inode.layers and inode.nlink):
                    inode.nlink, inode.is_reaped = 0, True
                continue  # others have removed what was written here: fs/conflicts.py keeps that
            if inode.number not in self._restated:
                fresh = loader.inode_from(self.client, record, inode.key, inode.parent)
                follow(inode, fresh)
                continue
            loader.verify_record(self.client, record, inode.key)
            is_older = inode.content_version < record.content_version
            if self.is_shared and is_older and inode.layers:
                continue  # others may have written it: fs/conflicts.py compares the versions
            inode.seal, inode.content_version = record.seal, record.content_version
            inode.committed_size, inode.allocated = record.size, record.allocated
            inode.xattr_count = record.xattr_count
            if record.allocated == 0:
                inode.rows = []

    async def _replay_xattrs(self) -> None:
        for item in self._replayed_xattrs:
            inode = self.inodes.get(item.inode)
            if inode is None or inode.is_reaped:
                continue
            if inode.xattrs is None:
                inode.xattrs = await loader.load_xattrs(self.client, inode)
            if item.value is None:
                inode.xattrs.pop(item.name, None)
            else:
                inode.xattrs[item.name] = item.value
        self._replayed_xattrs = []

    def _drop_orphans(self) -> None:
        """Reap what was unlinked while open: no handle survives a crash."""
        for inode in list(self.inodes.values()):
            if not inode.is_stub and inode.nlink == 0 and not inode.is_reaped:
                self.reap(inode)

    def reap(self, inode: Inode) -> None:
        """Give up an inode without names and handles."""
        assert inode.nlink == 0
        if inode.is_reaped:
            return
        inode.is_reaped = True
        if not self.is_shared:  # while shared, others may have it open: it goes at the next lease
            self.record(m.Reap(inode.number), inodes=(inode,))


def _stub(number: int) -> Inode:
    inode = Inode(number, 0, m.Kind.DIRECTORY, InodeKey(bytes(32)), 0, 2, 0, 0, 0, 0, 0, 0, 0)
    inode.is_stub = True
    return inode


async def open_session(
    client: BucketClient, cache_id: bytes, pid: int, *, is_exclusive: bool = False
) -> SessionState:
    """Open or reclaim a read-write session; raises BucketBusy."""
    info = await client.call(
        m.OPEN_SESSION,
        m.OpenSessionRequest(
            client.api_key, client.bucket, cache_id, socket.gethostname()[:200], pid, is_exclusive
        ),
    )
    return SessionState(
        info.session_id,
        info.last_sequence,
        info.last_chain,
        info.direct_sequence,
        info.holds_lease,
        info.first_number,
        info.first_number + info.number_count,
    )

"""What to do with a refused batch: operations apply where they still make sense, else beside.

A mount may have gone on working while its lease went to another session. What it did comes to
the satellite later; where it contradicts what the others did, nothing is dropped that holds bytes:
it appears as `name (conflict HOST TIME)`. Each refusal changes the batch a little, and the whole
batch is sent again.
"""

import logging
import socket
from collections import Counter, deque
from dataclasses import replace
from datetime import UTC, datetime

from dcsfs.fs import loader
from dcsfs.fs.state import Base, Batch, Dentry, FrozenInode, Inode
from dcsfs.fs.volume import Volume
from dcsfs.keys import InodeKey, Place, Sealed
from dcsfs.uplink.client import INLINE_SEGMENT
from network import messages as m
from network.errors import (
    AlreadyExists,
    DcsError,
    IntegrityError,
    NotFound,
    QuotaExceeded,
    Reserved,
)
from network.extentmap import EMPTY_MAP_ROOT, Row
from network.limits import NAME_BYTES_MAX

log = logging.getLogger(__name__)

NOTES_KEPT = 100
_NAMED = m.Create | m.Link | m.Unlink | m.Rename | m.Exchange


class Conflicts:
    """Settles refusals for one volume."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._client = volume.client
        self._moved: dict[tuple[int, bytes], tuple[int, bytes]] = {}
        """(directory, encrypted name) -> the place that was taken instead."""
        self.notes: deque[str] = deque(maxlen=NOTES_KEPT)
        """For `dcsfs status`: what was put aside or left out."""

    def _note(self, text: str) -> None:
        log.warning("%s", text)
        self.notes.append(text)

    async def settle(self, batch: Batch, operation: m.Operation, error: DcsError) -> bool:
        """Change a batch so that it may succeed; False if there is nothing to be changed.

        Raises what the satellite's answers raise; the batch is then as it was.
        """
        if isinstance(error, Reserved | QuotaExceeded):
            return False  # another session's older content comes first, or room
        if isinstance(operation, m.CommitContent):
            return await self._settle_content(batch, operation.inode)
        if isinstance(operation, m.SetAttributes):
            return await self._settle_attributes(batch, operation.inode)
        if operation not in batch.operations:
            return False
        if isinstance(operation, m.SetXattr) and isinstance(error, NotFound):
            batch.operations.remove(operation)  # the inode is gone: nothing is lost with it
            return True
        if not self._volume.is_shared:
            return False
        place = batch.operations.index(operation)
        before = batch.operations[:place]
        replacements = await self._replacements(operation, error, before)
        batch.operations[place : place + 1] = replacements
        return True

    async def _replacements(
        self, operation: m.Operation, error: DcsError, before: list[m.Operation]
    ) -> list[m.Operation]:
        """What to do instead of a refused operation on names or attributes.

        Those `before` it in the batch have been undone with it, and will be done again.
        """
        moved = self._moved_source(operation)
        if moved is not None:
            return [moved]
        match operation:
            case m.Create():
                found = await self._lookup(operation.parent, operation.name)
                if found is not None and found.inode.inode == operation.inode.inode:
                    return []
                return [await self._create_beside(operation, before)]
            case m.Rename() if (operation.new_parent, operation.new_name) in self._moved:
                parent, name = self._moved[operation.new_parent, operation.new_name]
                wrapped = self._wrap(parent, name, operation.inode)
                return [replace(operation, new_parent=parent, new_name=name, wrapped_key=wrapped)]
            case m.Rename():
                if (
                    await self._occupant(operation.parent, operation.name, before)
                    != operation.inode
                ):
                    return self._without_source(operation, before)
                return await self._rename_beside(operation, before)
            case m.Link() if isinstance(error, AlreadyExists):
                parent, name = self._beside(operation.parent, operation.name)
                self._moved[operation.parent, operation.name] = (parent, name)
                wrapped = self._wrap(parent, name, operation.inode)
                return [replace(operation, parent=parent, name=name, wrapped_key=wrapped)]
            case _:
                return self._left_out(operation, str(error))

    def _left_out(self, operation: m.Operation, why: str) -> list[m.Operation]:
        name = ""
        if isinstance(operation, _NAMED):
            name = repr(self._clear_name(operation.parent, operation.name))
        if not isinstance(operation, m.Reap):
            self._note(f"{type(operation).__name__} {name} was left out: {why}")
        return []

    def _moved_source(self, operation: m.Operation) -> m.Operation | None:
        """The operation on the name that one of ours got instead, if it got one."""
        if not isinstance(operation, m.Unlink | m.Rename):
            return None
        place = self._moved.pop((operation.parent, operation.name), None)
        if place is None:
            return None
        return replace(operation, parent=place[0], name=place[1])

    async def _lookup(self, parent: int, name: bytes) -> m.EntryRecord | None:
        request = m.LookupRequest(self._client.api_key, self._client.bucket, parent, name)
        try:
            return await self._client.call(m.LOOKUP, request)
        except NotFound:
            return None

    def _without_source(self, operation: m.Rename, before: list[m.Operation]) -> list[m.Operation]:
        """A rename whose source others have taken: what it replaced here stays, if that has bytes.

        A file made and replaced under the same lost lease has none: they were not worth sending.
        """
        left = self._left_out(operation, "its source is not there any more")
        replaced = operation.replaced
        if any(isinstance(op, m.Create) and op.inode.inode == replaced for op in before):
            left.append(m.Unlink(operation.new_parent, operation.new_name, replaced))
        return left

    async def _occupant(self, parent: int, name: bytes, before: list[m.Operation]) -> int:
        """The inode a name stands for once what comes before is done; 0 for none."""
        for earlier in reversed(before):
            for place, inode in _names_after(earlier):
                if place == (parent, name):
                    return inode
        found = await self._lookup(parent, name)
        return found.inode.inode if found is not None else 0

    async def _is_directory_there(self, number: int, before: list[m.Operation]) -> bool:
        made = any(isinstance(op, m.Create) and op.inode.inode == number for op in before)
        return made or await self._exists(number)

    async def _exists(self, inode: int) -> bool:
        request = m.InodeRequest(self._client.api_key, self._client.bucket, inode)
        try:
            return (await self._client.call(m.GET_INODE, request)).nlink > 0
        except NotFound:
            return False

    async def _create_beside(self, operation: m.Create, before: list[m.Operation]) -> m.Create:
        parent = operation.parent
        if not await self._is_directory_there(parent, before):
            parent = self._volume.root.number
        place, name = self._beside(operation.parent, operation.name, parent)
        self._moved[operation.parent, operation.name] = (place, name)
        wrapped = self._wrap(place, name, operation.inode.inode)
        return replace(operation, parent=place, name=name, wrapped_key=wrapped)

    async def _rename_beside(
        self, operation: m.Rename, before: list[m.Operation]
    ) -> list[m.Operation]:
        parent, name = operation.new_parent, operation.new_name
        is_there = await self._is_directory_there(parent, before)
        if is_there and not await self._occupant(parent, name, before):
            if not operation.replaced:
                return self._left_out(operation, "it cannot go there any more")
            return [replace(operation, replaced=0)]
        place, new_name = self._beside(
            parent, name, parent if is_there else self._volume.root.number
        )
        self._moved[parent, name] = (place, new_name)
        wrapped = self._wrap(place, new_name, operation.inode)
        return [
            replace(operation, new_parent=place, new_name=new_name, wrapped_key=wrapped, replaced=0)
        ]

    def _directory(self, number: int) -> Inode:
        found = self._volume.inodes.get(number)
        if found is None or found.is_stub:
            raise IntegrityError(f"the directory {number} of a conflict is not known")
        return found

    def _clear_name(self, parent: int, encrypted: bytes) -> str:
        return self._directory(parent).key.decrypt_name(encrypted).decode(errors="replace")

    def _beside(self, parent: int, encrypted: bytes, place: int | None = None) -> tuple[int, bytes]:
        """(directory, encrypted name) of the conflict copy of a name."""
        place = parent if place is None else place
        name = self._directory(parent).key.decrypt_name(encrypted)
        return place, self._conflict_name(place, name)

    def _conflict_name(self, place: int, name: bytes) -> bytes:
        now = datetime.fromtimestamp(self._volume.runtime.now_ns() / 1e9, tz=UTC)
        host = socket.gethostname()[:40]
        # Milliseconds: two copies of one name must not meet.
        stamp = now.strftime("%Y-%m-%d %H.%M.%S.") + f"{now.microsecond // 1000:03d}"
        suffix = f" (conflict {host} {stamp})".encode()
        copy = name[: NAME_BYTES_MAX - len(suffix)] + suffix
        self._note(
            f"{name.decode(errors='replace')!r} was kept as {copy.decode(errors='replace')!r}"
        )
        return self._directory(place).key.encrypt_name(copy)

    def _wrap(self, parent: int, encrypted: bytes, child: int) -> bytes:
        inode = self._volume.inodes[child]
        place = Place(parent, child, inode.generation, inode.kind)
        return self._directory(parent).key.wrap_child(
            inode.key.secret, self._client.bucket_id, place, encrypted
        )

    async def _refreshed(self, inode: Inode) -> Inode | None:
        """The satellite's state of an inode; None if it is gone."""
        request = m.InodeRequest(self._client.api_key, self._client.bucket, inode.number)
        try:
            record = await self._client.call(m.GET_INODE, request)
        except NotFound:
            return None
        return loader.inode_from(self._client, record, inode.key, inode.parent)

    async def _settle_attributes(self, batch: Batch, number: int) -> bool:
        """Others have changed the inode: ours go on top of what it is now."""
        inode = batch.touched[number]
        fresh = await self._refreshed(inode)
        if fresh is None:
            del batch.touched[number]
            return True
        self._take_over(inode, fresh)
        return True

    def _take_over(self, inode: Inode, fresh: Inode) -> None:
        if self._volume.is_shared:
            self._volume.follow(inode, fresh)
        else:
            inode.seal = fresh.seal

    async def settle_overtaken(self, batch: Batch) -> None:
        """Put content aside, before it is sent, where others have changed the same file."""
        for number in list(batch.layers):
            inode = batch.touched[number]
            if not inode.is_reaped and inode.content_version:
                await self._settle_content(batch, number)

    async def spare(self, batch: Batch) -> None:
        """Leave out, before it is committed, what would undo what others have done since.

        A file they have written to is not removed or replaced, nor does one that has a name here
        lose the last one it has there. Once per batch, when those before it are committed.
        """
        if not batch.is_overtaken or batch.is_spared:
            return
        kept: list[m.Operation] = []
        links: Counter[int] = Counter()
        for operation in batch.operations:
            loser = m.loses_a_name(operation)
            if loser and await self._is_needed(batch, loser, links[loser]):
                kept += await self._without_loss(operation, kept)
                continue
            kept.append(operation)
            links[loser] -= 1
            if isinstance(operation, m.Link):
                links[operation.inode] += 1
        batch.operations, batch.is_spared = kept, True

    async def _is_needed(self, batch: Batch, number: int, change: int) -> bool:
        """Whether an inode must keep a name; `change`: links it has had and lost in the batch."""
        request = m.InodeRequest(self._client.api_key, self._client.bucket, number)
        try:
            record = await self._client.call(m.GET_INODE, request)
        except NotFound:
            return False
        inode = self._volume.inodes.get(number)
        is_alive = inode is not None and inode.nlink > 0 and not inode.is_reaped
        is_last = record.nlink + change <= 1
        return record.content_version > batch.losers.get(number, 0) or (is_alive and is_last)

    async def _without_loss(
        self, operation: m.Operation, before: list[m.Operation]
    ) -> list[m.Operation]:
        if isinstance(operation, m.Rename):
            return await self._rename_beside(operation, before)
        return self._left_out(operation, "others have changed the file since")

    async def _settle_content(self, batch: Batch, number: int) -> bool:
        inode, layer = batch.touched[number], batch.layers[number]
        fresh = await self._refreshed(inode)
        if fresh is not None and fresh.nlink == 0 and batch.is_overtaken:
            fresh = None  # removed by others while it was changed here: not lost with them
        if fresh is not None and fresh.content_version < inode.content_version:
            raise IntegrityError(f"inode {number} was rolled back at the satellite")
        is_contested = fresh is None or fresh.content_version != inode.content_version
        if not is_contested and not (batch.is_overtaken and inode.base):
            assert fresh is not None
            self._take_over(inode, fresh)
            return True
        if fresh is not None and not self._volume.is_shared:
            return False
        if fresh is not None:
            self._volume.follow(inode, fresh)
        base = inode.base or Base(inode.rows, inode.placements, inode.committed_size)
        is_whole = layer.cut == 0 or (base.rows is not None and not _inline_rows(base))
        if fresh is None or (batch.is_overtaken and is_whole):
            self._copy_content(batch, inode, base)
        return True

    def _copy_content(self, batch: Batch, inode: Inode, base: Base) -> None:
        """Have all that is staged for an inode become a file of its own, from `batch` on.

        It has the original's key, so extents of the original can be part of it.
        """
        volume = self._volume
        parent = volume.inodes.get(inode.parent) or volume.root
        if parent.is_stub or parent.nlink == 0:
            parent = volume.root
        name = next((d.name for d in parent.children.values() if d.child == inode.number), b"file")
        number, dentry_id = volume.new_number(), volume.new_number()
        copy = Inode(
            number, 1, inode.kind, InodeKey(inode.key.secret), inode.rdev, 1, inode.mode,
            inode.uid, inode.gid, inode.atime_ns, inode.mtime_ns, inode.ctime_ns, inode.size,
            committed_size=base.size if base.rows else 0, parent=parent.number, xattrs={},
            rows=[row for row in base.rows or [] if row not in _inline_rows(base)],
            placements=dict(base.placements),
        )  # fmt: skip
        sealed = Sealed(number, 1, inode.kind, copy.attributes, 0, 0, EMPTY_MAP_ROOT)
        seal = copy.key.seal(self._client.bucket_id, sealed)
        volume.inodes[number] = copy
        encrypted = self._conflict_name(parent.number, name)
        create = m.Create(
            parent.number, encrypted, dentry_id, self._wrap(parent.number, encrypted, number),
            m.NewInode(number, 1, inode.kind, inode.rdev, copy.attributes, b"", seal),
        )  # fmt: skip
        batch.operations.append(create)
        clear_name = parent.key.decrypt_name(encrypted)
        parent.children[clear_name] = Dentry(dentry_id, clear_name, number, inode.kind)
        self._move_layers(inode, copy)

    def _move_layers(self, inode: Inode, copy: Inode) -> None:
        volume = self._volume
        copy.layers, inode.layers, inode.base = inode.layers, [], None
        inode.size = inode.committed_size
        for batch in (*volume.queue, volume.open_batch):
            layer = batch.layers.pop(inode.number, None)
            if layer is None:
                continue
            batch.layers[copy.number] = layer
            batch.touched.pop(inode.number, None)
            batch.touched[copy.number] = copy
            frozen = batch.frozen.pop(inode.number, None)
            if frozen is not None:
                batch.frozen[copy.number] = FrozenInode(frozen.attributes, frozen.size, dead=False)
            batch.prepared = None


def _names_after(operation: m.Operation) -> list[tuple[tuple[int, bytes], int]]:
    """Names that an operation makes or takes: ((directory, encrypted name), inode or 0)."""
    match operation:
        case m.Create():
            return [((operation.parent, operation.name), operation.inode.inode)]
        case m.Link():
            return [((operation.parent, operation.name), operation.inode)]
        case m.Unlink():
            return [((operation.parent, operation.name), 0)]
        case m.Rename():
            return [
                ((operation.new_parent, operation.new_name), operation.inode),
                ((operation.parent, operation.name), 0),
            ]
        case m.Exchange():
            return [
                ((operation.parent, operation.name), operation.other_inode),
                ((operation.other_parent, operation.other_name), operation.inode),
            ]
        case _:
            return []


def _inline_rows(base: Base) -> list[Row]:
    """Rows whose bytes lie in the satellite's database: they go with the last reference."""
    return [
        row
        for row in base.rows or []
        if base.placements[row.extent_id].segment_id == INLINE_SEGMENT
    ]

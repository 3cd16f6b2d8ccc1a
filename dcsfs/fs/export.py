"""Copy what is staged in a cache directory to ordinary files, without the network.

For data that cannot be uploaded any more: the grant was revoked, the bucket is gone. Only what the
log holds can be exported: files made or written since the last commit. Of a file that was written
in part the rest is a hole here; the list beside the files says which bytes are real.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from dcsfs import keys
from dcsfs.access import AccessGrant
from dcsfs.cache import identity
from dcsfs.cache.intervals import IntervalMap
from dcsfs.cache.log import Position, WriteLog
from dcsfs.fs import journal
from network.codec import unpack
from network.errors import IntegrityError, InvalidArgument
from network.files import DirectoryLock
from network.messages import Create, Kind
from network.runtime import Runtime

LIST_NAME = "EXPORTED.txt"


@dataclass(slots=True)
class _Staged:
    """An inode as the log leaves it."""

    state: journal.InodeState
    is_new: bool = False
    size: int = 0
    data: IntervalMap[Position] = field(default_factory=IntervalMap)
    is_changed: bool = False


@dataclass(frozen=True, slots=True)
class Exported:
    """One file that was written out."""

    path: str
    size: int
    is_whole: bool
    ranges: tuple[tuple[int, int], ...]


class _Replay:
    """What a log holds that is not known to be committed."""

    def __init__(self, log: WriteLog) -> None:
        self._log = log
        self.inodes: dict[int, _Staged] = {}
        self.names: dict[int, tuple[int, bytes]] = {}
        """Inode -> (directory, name), the last one it got."""
        head = journal.DATA_HEAD.size
        records = list(log.replay())
        covered = _covered([(kind, bytes(p)) for _, kind, p in records if kind >= journal.FLUSH])
        for position, kind, payload in records:
            if kind == journal.OPERATION:
                record = unpack(journal.OperationRecord, bytes(payload))
                self._take_operation(record, is_committed=position.sequence <= covered)
            elif position.sequence <= covered:
                continue
            elif kind == journal.DATA:
                number, offset, _ = journal.DATA_HEAD.unpack_from(bytes(payload[:head]))
                staged = self.inodes[number]
                end = offset + position.payload_bytes - head
                staged.data.insert(offset, end, position, head)
                staged.size, staged.is_changed = max(staged.size, end), True
            elif kind == journal.TRUNCATE:
                cut = unpack(journal.TruncateRecord, bytes(payload))
                staged = self.inodes[cut.inode]
                if cut.size < staged.size:
                    staged.data.clear(cut.size, staged.size)
                staged.size, staged.is_changed = cut.size, True
                staged.is_new = staged.is_new or cut.size == 0

    def _take_operation(self, record: journal.OperationRecord, *, is_committed: bool) -> None:
        for state in record.inodes:
            staged = self.inodes.setdefault(state.number, _Staged(state))
            staged.state, staged.size = state, state.size
        if isinstance(record.operation, Create):
            made = self.inodes[record.operation.inode.inode]
            made.is_new = made.is_changed = not is_committed
        for entry in record.dentries:
            if entry.child:
                self.names[entry.child] = (entry.parent, entry.name)

    def path_of(self, number: int) -> Path:
        """Where the inode was, as far as the log says."""
        parts: list[str] = []
        while number in self.names and len(parts) < 64:
            number, name = self.names[number]
            parts.append(os.fsdecode(name))
        if not parts:
            parts.append(f"inode {number}")
        return Path(*reversed(parts))

    def write(self, staged: _Staged, target: Path) -> tuple[tuple[int, int], ...]:
        """Write one file's staged bytes; returns their ranges."""
        ranges: list[tuple[int, int]] = []
        with target.open("xb") as handle:
            for run in staged.data.runs:
                payload = self._log.read(run.source)
                handle.seek(run.start)
                handle.write(payload[run.source_offset :][: run.end - run.start])
                if ranges and ranges[-1][1] == run.start:
                    ranges[-1] = (ranges[-1][0], run.end)
                else:
                    ranges.append((run.start, run.end))
            handle.truncate(staged.size)
        return tuple(ranges)


def _covered(records: list[tuple[int, bytes]]) -> int:
    done = {unpack(journal.DoneRecord, data) for kind, data in records if kind == journal.DONE}
    covered = 0
    for kind, data in records:
        if kind == journal.FLUSH:
            flush = unpack(journal.FlushRecord, data)
            if journal.DoneRecord(flush.session_id, flush.sequence) in done:
                covered = max(covered, flush.covered)
    return covered


def export_cache(
    runtime: Runtime, grant: AccessGrant, directory: Path, target: Path
) -> list[Exported]:
    """Write everything staged in a cache directory below `target`, which must not exist.

    The cache directory is left as it is. Raises InvalidArgument, WrongPassphrase, IntegrityError.
    """
    own = identity.load(directory)
    root_key = grant.open_bucket(own.bucket_id, own.wrapped_root_key)
    lock = DirectoryLock(directory, "cache directory")
    try:
        log_key = keys.derive(root_key, b"log " + own.cache_id)
        log = WriteLog(directory / "log", log_key, runtime)
        try:
            target.mkdir(parents=True)
        except OSError as error:
            raise InvalidArgument(f"{target}: {error.strerror}") from error
        try:
            return _write_all(_Replay(log), target)
        except KeyError as error:
            raise IntegrityError(f"the log does not describe inode {error}") from error
        finally:
            log.close()
    finally:
        lock.release()


def _write_all(replay: _Replay, target: Path) -> list[Exported]:
    found: list[Exported] = []
    for number, staged in sorted(replay.inodes.items()):
        if not staged.is_changed or not staged.state.nlink:
            continue
        path = target / replay.path_of(number)
        if staged.state.kind is Kind.DIRECTORY:
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        while os.path.lexists(path):
            path = path.with_name(f"{path.name} (inode {number})")
        name = str(path.relative_to(target))
        if staged.state.kind is Kind.SYMLINK:
            path.symlink_to(os.fsdecode(staged.state.symlink))
            found.append(Exported(name, 0, True, ()))
        elif staged.state.kind is Kind.FILE:
            ranges = replay.write(staged, path)
            path.chmod(staged.state.attributes.mode & 0o777)
            found.append(Exported(name, staged.size, staged.is_new, ranges))
    lines = [
        f"{'whole' if item.is_whole else 'parts'}\t{item.size}\t"
        f"{' '.join(f'{a}-{b}' for a, b in item.ranges)}\t{item.path}\n"
        for item in found
    ]
    head = "state\tsize\tbytes that were staged\tfile\n"
    (target / LIST_NAME).write_text(head + "".join(lines), errors="surrogateescape")
    return found

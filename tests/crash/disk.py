"""A disk that forgets: records what a log does to its directory, and rebuilds it after a power cut.

What a file system promises is little: a write is there for sure once fdatasync on its file has
returned, a name once fsync on its directory has. Until then each may be there, be missing, or
(a write) be there page by page.
"""

import os
import random
from dataclasses import dataclass, field
from pathlib import Path

PAGE_BYTES = 4096


class PowerCut(BaseException):
    """Ends the client at once; not an Exception, so that no error handling sees it."""


@dataclass
class Event:
    """One call that changes the directory."""

    kind: str
    """create, unlink, extend or write."""
    name: str
    offset: int = 0
    data: bytes = b""
    is_durable: bool = False


@dataclass
class RecordingDisk:
    """Stands in for `os` in `dcsfs.cache.log`; everything really happens, too."""

    cut_at: int | None = None
    """The power goes before this call takes effect; None for never."""
    events: list[Event] = field(default_factory=list)
    calls: int = 0
    _names: dict[int, str] = field(default_factory=dict)

    def __getattr__(self, name):
        return getattr(os, name)

    def _tick(self) -> None:
        if self.cut_at is not None and self.calls >= self.cut_at:
            raise PowerCut
        self.calls += 1

    def open(self, path, flags, mode=0o777):
        self._tick()
        if flags & os.O_CREAT:
            self.events.append(Event("create", Path(path).name))
        descriptor = os.open(path, flags, mode)
        self._names[descriptor] = Path(path).name
        return descriptor

    def posix_fallocate(self, descriptor, offset, length):
        self._tick()
        self.events.append(Event("extend", self._names[descriptor], offset + length))
        os.posix_fallocate(descriptor, offset, length)

    def unlink(self, path):
        self._tick()
        self.events.append(Event("unlink", Path(path).name))
        os.unlink(path)

    def fdatasync(self, descriptor):
        self._tick()
        name = self._names[descriptor]
        for event in self.events:
            if event.name == name and event.kind in ("write", "extend"):
                event.is_durable = True

    def write_fully(self, descriptor, data, offset):
        self._tick()
        self.events.append(Event("write", self._names[descriptor], offset, bytes(data)))
        os.pwrite(descriptor, data, offset)

    def sync_directory(self, path):
        self._tick()
        for event in self.events:
            if event.kind in ("create", "unlink"):
                event.is_durable = True

    def rebuild(self, directory: Path, before: dict[str, bytes], chance: random.Random | None):
        """Write the directory as it may be after the cut.

        `before` is what it held when recording began. Without `chance` only what is durable has
        happened; with it, each other event happens, does not, or (a write) does in part.
        """
        directory.mkdir(parents=True)
        files = {name: bytearray(data) for name, data in before.items()}
        hidden: dict[str, bytearray] = {}
        for event in self.events:
            happens = event.is_durable or (chance is not None and chance.random() < 0.5)
            if event.kind == "create":
                # Writes into a file whose name is lost are lost with it.
                (files if happens else hidden)[event.name] = bytearray()
            elif event.kind == "unlink":
                if happens:
                    files.pop(event.name, None)
                hidden.pop(event.name, None)
            else:
                target = files.get(event.name, hidden.get(event.name))
                if target is not None:
                    self._apply(event, target, happens, chance)
        for name, data in files.items():
            (directory / name).write_bytes(data)

    @staticmethod
    def _apply(event: Event, target: bytearray, happens: bool, chance) -> None:
        if event.kind == "extend":
            if happens and len(target) < event.offset:
                target.extend(bytes(event.offset - len(target)))
            return
        pages = range(0, len(event.data), PAGE_BYTES)
        is_torn = not event.is_durable and chance is not None and chance.random() < 0.5
        for start in pages:
            if happens if not is_torn else chance.random() < 0.5:
                part = event.data[start : start + PAGE_BYTES]
                offset = event.offset + start
                if len(target) < offset + len(part):
                    target.extend(bytes(offset + len(part) - len(target)))
                target[offset : offset + len(part)] = part


def contents(directory: Path) -> dict[str, bytes]:
    """The files of a directory."""
    if not directory.exists():
        return {}
    return {path.name: path.read_bytes() for path in directory.iterdir()}

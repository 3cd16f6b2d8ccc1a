"""What the mount knows: inodes, dentries, layers of unflushed content, batches.

Plain state without I/O. An inode's content is its committed rows with layers on top, one layer
per batch that has touched it; the newest layer belongs to the open batch.
"""

from dataclasses import dataclass, field

from dcsfs.cache.intervals import IntervalMap, Run
from dcsfs.cache.log import Position
from dcsfs.keys import InodeKey
from dcsfs.uplink.packing import PlannedExtent
from network import extentmap
from network.extentmap import Row
from network.ids import ExtentID
from network.limits import FILE_BYTES_MAX
from network.messages import Attributes, Kind, Operation, Placement


@dataclass(slots=True)
class Dentry:
    """A name in a directory."""

    dentry_id: int
    name: bytes
    child: int
    kind: Kind


@dataclass(slots=True)
class Layer:
    """Content changes of one inode in one batch."""

    cut: int = FILE_BYTES_MAX
    """Below this layer, bytes at or past `cut` read as zeros: the smallest truncation."""
    data: IntervalMap[Position] = field(default_factory=IntervalMap)


@dataclass(slots=True)
class Batch:
    """Operations and dirty inodes that go to the satellite in one transaction."""

    operations: list[Operation] = field(default_factory=list)
    touched: dict[int, "Inode"] = field(default_factory=dict)
    """Inodes whose attributes or content this batch must bring up to date."""
    layers: dict[int, Layer] = field(default_factory=dict)
    frozen: dict[int, "FrozenInode"] = field(default_factory=dict)
    last_sequence: int = 0
    """Number of the last log record that belongs to it, once frozen."""
    data_bytes: int = 0
    weight: int = 0
    """KiB of attribute values, which count like operations."""
    opened_at: float = 0.0
    is_demanded: bool = False
    """Somebody waits for it: it goes whatever its age and size."""
    prepared: "Prepared | None" = None
    """Set once its content is on the nodes."""

    def __bool__(self) -> bool:
        return bool(self.operations or self.touched)


@dataclass(slots=True)
class Content:
    """One file's part of a batch."""

    inode: "Inode"
    layer: Layer
    frozen: "FrozenInode"
    extents: list[PlannedExtent] = field(default_factory=list)


@dataclass(slots=True)
class Prepared:
    """A batch whose content is on the nodes: what its transaction needs."""

    contents: list[Content]
    operations: list[Operation] = field(default_factory=list)
    placements: dict[ExtentID, Placement] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FrozenInode:
    """An inode's attributes at the moment its batch was frozen."""

    attributes: Attributes
    size: int
    dead: bool
    """No name and no open handle: its content is not worth sending."""


@dataclass(slots=True)
class Inode:
    """An inode as the mount sees it now."""

    number: int
    generation: int
    kind: Kind
    key: InodeKey
    rdev: int
    nlink: int
    mode: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    size: int
    content_version: int = 0
    """Of the committed content."""
    committed_size: int = 0
    allocated: int = 0
    """Bytes of committed rows."""
    seal: bytes = b""
    """The committed seal; empty for an inode the satellite has not seen."""
    symlink: bytes = b""
    parent: int = 0
    """Of a directory: where `..` leads."""
    xattrs: dict[bytes, bytes] | None = None
    xattr_count: int = 0
    children: dict[bytes, Dentry] = field(default_factory=dict)
    absent: set[bytes] = field(default_factory=set)
    """Names known not to exist."""
    is_complete: bool = False
    """Whether `children` holds every entry of the directory."""
    lookups_sent: int = 0
    """Names of this directory asked of the satellite one by one."""
    rows: list[Row] | None = None
    placements: dict[ExtentID, Placement] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    open_count: int = 0
    lookup_count: int = 0
    is_reaped: bool = False
    is_stub: bool = False
    """Only its number and dentries are known: replayed before its record was loaded."""

    @property
    def attributes(self) -> Attributes:
        """The clear attributes."""
        return Attributes(
            self.mode, self.uid, self.gid, self.atime_ns, self.mtime_ns, self.ctime_ns
        )

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return self.kind is Kind.DIRECTORY

    @property
    def stored_bytes(self) -> int:
        """For st_blocks: committed rows and unflushed bytes."""
        return self.allocated + sum(layer.data.total_bytes for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a read: bytes [start, end) from the log, from a committed row, or zeros."""

    start: int
    end: int
    staged: Run[Position] | None = None
    row: Row | None = None


def resolve(inode: Inode, start: int, end: int, rows: list[Row]) -> list[Piece]:
    """Where the bytes [start, end) of a file are now, in order. Pure."""
    pieces: list[Piece] = []
    _resolve_below(inode.layers, len(inode.layers) - 1, start, end, rows, pieces)
    return pieces


def _resolve_below(
    layers: list[Layer], top: int, start: int, end: int, rows: list[Row], pieces: list[Piece]
) -> None:
    if start >= end:
        return
    if top < 0:
        for low, high, row in extentmap.runs(rows, start, end):
            pieces.append(Piece(low, high, row=row))
        return
    layer = layers[top]
    for low, high, run in layer.data.cut(start, end):
        if run is not None:
            pieces.append(Piece(low, high, staged=run))
            continue
        visible = max(low, min(high, layer.cut))
        _resolve_below(layers, top - 1, low, visible, rows, pieces)
        if visible < high:
            pieces.append(Piece(visible, high))

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
    end: int = 0
    """The file is at least so long: where writes and truncations of this layer have left it."""
    data: IntervalMap[Position] = field(default_factory=IntervalMap)

    def size_over(self, below: int) -> int:
        """The file's size with this layer on top of `below` bytes."""
        return max(min(below, self.cut), self.end)


@dataclass(slots=True)
class Batch:
    """Operations and dirty inodes that go to the satellite in one transaction."""

    operations: list[Operation] = field(default_factory=list)
    touched: dict[int, "Inode"] = field(default_factory=dict)
    """Inodes whose attributes or content this batch must bring up to date."""
    layers: dict[int, Layer] = field(default_factory=dict)
    frozen: dict[int, "FrozenInode"] = field(default_factory=dict)
    losers: dict[int, int] = field(default_factory=dict)
    """Inodes that lose a name in it, and the content version that was known then."""
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
    is_overtaken: bool = False
    """Made under a lease that was taken: what contradicts others becomes conflict copies."""
    is_spared: bool = False
    """Nothing in it undoes what others have done since."""

    def __bool__(self) -> bool:
        return bool(self.operations or self.touched)


@dataclass(slots=True)
class Content:
    """One file's part of a batch."""

    inode: "Inode"
    layer: Layer
    frozen: "FrozenInode"
    foreign_changes: int
    """The inode's count when this was planned."""
    extents: list[PlannedExtent] = field(default_factory=list)

    @property
    def is_outdated(self) -> bool:
        """Whether the inode's map has changed since this was planned."""
        return self.inode.rows is None or self.inode.foreign_changes != self.foreign_changes


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


@dataclass(frozen=True, slots=True)
class Base:
    """Committed content as it was: its map, if that was loaded, and size."""

    rows: list[Row] | None
    placements: dict[ExtentID, Placement]
    size: int


_NO_CHILDREN: dict[bytes, Dentry] = {}
_NO_NAMES: set[bytes] = set()
"""Of everything but directories; nothing is ever put there."""


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
    children: dict[bytes, Dentry] = field(init=False)
    absent: set[bytes] = field(init=False)
    """Names known not to exist."""
    is_complete: bool = False
    """Whether `children` holds every entry of the directory."""
    is_large: bool = False
    """It has more entries than are kept in memory: they are read page by page."""
    unknown: set[bytes] = field(init=False)
    """Names that another session has changed: neither in `children` nor absent for sure."""
    name_changes: int = 0
    """Counts changes to names here by others: an answer asked for before one is too old."""
    is_stale: bool = False
    """Another session has changed its attributes or content since they were loaded."""
    foreign_changes: int = 0
    """Counts the versions of others that were taken over."""
    kernel_changes: int = 0
    """`foreign_changes` when the kernel last began to keep pages of it."""
    base: "Base | None" = None
    """What the staged content was made on, once a version of others has taken its place."""
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
    used: int = 0
    """The sweep before which it was last asked for (fs/residence.py)."""

    def __post_init__(self) -> None:
        """Only directories pay for names."""
        is_directory = self.kind is Kind.DIRECTORY
        self.children = {} if is_directory else _NO_CHILDREN
        self.absent = set() if is_directory else _NO_NAMES
        self.unknown = set() if is_directory else _NO_NAMES

    @property
    def attributes(self) -> Attributes:
        """The clear attributes."""
        return Attributes(
            self.mode, self.uid, self.gid, self.atime_ns, self.mtime_ns, self.ctime_ns
        )

    @property
    def is_in_use(self) -> bool:
        """Whether it is open, or the kernel may open it."""
        return self.open_count > 0 or self.lookup_count > 0

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return self.kind is Kind.DIRECTORY

    @property
    def stored_bytes(self) -> int:
        """For st_blocks: committed rows and unflushed bytes."""
        return self.allocated + sum(layer.data.total_bytes for layer in self.layers)


_CLEAN_FIELDS = (
    "nlink", "mode", "uid", "gid", "content_version", "committed_size", "allocated", "seal",
    "symlink",
)  # fmt: skip


def follow(known: Inode, fresh: Inode) -> None:
    """Take over the satellite's record of an inode; what is staged stays on top of it.

    Answers may overtake each other: one that is older than what is known changes nothing.
    """
    if fresh.content_version < known.content_version:
        return
    if known.content_version != fresh.content_version:
        if known.layers and known.base is None:
            known.base = Base(known.rows, known.placements, known.committed_size)
        known.rows, known.placements = fresh.rows, {}
        known.foreign_changes += 1
    if known.ctime_ns != fresh.ctime_ns:  # extended attributes may be others: ask when needed
        known.xattrs, known.xattr_count = fresh.xattrs, fresh.xattr_count
    for name in _CLEAN_FIELDS:
        setattr(known, name, getattr(fresh, name))
    known.size = fresh.size
    for layer in known.layers:
        known.size = layer.size_over(known.size)
    if not known.layers:
        known.atime_ns, known.mtime_ns = fresh.atime_ns, fresh.mtime_ns
        known.ctime_ns = fresh.ctime_ns


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

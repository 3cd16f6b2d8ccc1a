"""All messages and methods, as fixed-order arrays (docs/specs/wire.md lists the numbers).

Integers are unsigned unless said otherwise; times are nanoseconds since 1970 (signed) when the
name ends in `_ns` and seconds when it ends in `_s`; sizes are bytes.
"""

import enum
from dataclasses import dataclass
from typing import Annotated, ClassVar

from network.codec import Max
from network.extentmap import Row
from network.identity import PeerAddress
from network.ids import (
    ExtentID,
    Hash,
    NodeID,
    PublicKey,
    SegmentID,
    SessionID,
)
from network.limits import (
    APPLY_DEADLINE_S,
    APPLY_OPERATIONS_MAX,
    ENCRYPTED_NAME_BYTES_MAX,
    LIST_PAGE_ENTRIES_MAX,
    LOCATE_SEGMENTS_MAX,
    MACAROON_BYTES_MAX,
    MAP_PAGE_ROWS_MAX,
    OPEN_SESSION_DEADLINE_S,
    PATH_PAGE_ENTRIES_MAX,
    PIECES_PER_SEGMENT_MAX,
    SYMLINK_BYTES_MAX,
    XATTR_VALUE_BYTES_MAX,
    XATTRS_PER_INODE_MAX,
)
from network.method import Method
from network.orders import OrderLimit, Receipt, SignedRoot

ApiKey = Annotated[bytes, Max(MACAROON_BYTES_MAX)]
BucketName = Annotated[str, Max(63)]
EncryptedName = Annotated[bytes, Max(ENCRYPTED_NAME_BYTES_MAX)]
WrappedKey = Annotated[bytes, Max(128)]
Seal = Annotated[bytes, Max(128)]
Text = Annotated[str, Max(256)]


@dataclass(frozen=True, slots=True)
class Empty:
    """A reply without content."""


class Kind(enum.IntEnum):
    """What an inode is; the values are POSIX's file type bits shifted right by 12."""

    FIFO = 1
    CHARACTER_DEVICE = 2
    DIRECTORY = 4
    BLOCK_DEVICE = 6
    FILE = 8
    SYMLINK = 10
    SOCKET = 12


@dataclass(frozen=True, slots=True)
class Attributes:
    """What the satellite keeps of an inode in the clear and a client may set."""

    mode: int
    """Permission bits only, 0 to 0o7777."""
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class InodeRecord:
    """An inode as the satellite hands it out."""

    inode: int
    generation: int
    kind: Kind
    rdev: int
    nlink: int
    size: int
    allocated: int
    """Bytes of the file that are not holes."""
    content_version: int
    attributes: Attributes
    symlink: Annotated[bytes, Max(2 * SYMLINK_BYTES_MAX)]
    """Encrypted target of a symbolic link, else empty."""
    seal: Seal
    xattr_count: int


@dataclass(frozen=True, slots=True)
class EntryRecord:
    """A dentry and the inode it names."""

    dentry_id: int
    name: EncryptedName
    wrapped_key: WrappedKey
    inode: InodeRecord


@dataclass(frozen=True, slots=True)
class NewInode:
    """An inode at its creation; `nlink` follows from the operation."""

    inode: int
    generation: int
    kind: Kind
    rdev: int
    attributes: Attributes
    symlink: Annotated[bytes, Max(2 * SYMLINK_BYTES_MAX)]
    seal: Seal


@dataclass(frozen=True, slots=True)
class Create:
    """Make an inode and its first dentry; AlreadyExists if the name is taken."""

    TAG: ClassVar[int] = 1
    parent: int
    name: EncryptedName
    dentry_id: int
    wrapped_key: WrappedKey
    inode: NewInode


@dataclass(frozen=True, slots=True)
class Link:
    """Add a dentry to an inode that is not a directory."""

    TAG: ClassVar[int] = 2
    parent: int
    name: EncryptedName
    dentry_id: int
    wrapped_key: WrappedKey
    inode: int


@dataclass(frozen=True, slots=True)
class Unlink:
    """Remove a dentry; a directory must be empty. PreconditionFailed if it names another inode.

    At nlink 0 the inode stays, for open handles, until `Reap` or the end of the session.
    """

    TAG: ClassVar[int] = 3
    parent: int
    name: EncryptedName
    inode: int


@dataclass(frozen=True, slots=True)
class Rename:
    """Move a dentry. `replaced` is the inode the new name holds now, 0 for none (NOREPLACE)."""

    TAG: ClassVar[int] = 4
    parent: int
    name: EncryptedName
    inode: int
    new_parent: int
    new_name: EncryptedName
    dentry_id: int
    wrapped_key: WrappedKey
    replaced: int


@dataclass(frozen=True, slots=True)
class Exchange:
    """Swap what two dentries name; each key is wrapped for its new place."""

    TAG: ClassVar[int] = 5
    parent: int
    name: EncryptedName
    inode: int
    other_parent: int
    other_name: EncryptedName
    other_inode: int
    wrapped_key: WrappedKey
    """Of `inode`, at the other place."""
    other_wrapped_key: WrappedKey
    """Of `other_inode`, at the first place."""


@dataclass(frozen=True, slots=True)
class SetAttributes:
    """Set an inode's clear attributes and its seal.

    PreconditionFailed unless its seal is `expected_seal` (empty: any), so that two writers cannot
    leave a seal over a state that never was.
    """

    TAG: ClassVar[int] = 6
    inode: int
    attributes: Attributes
    seal: Seal
    expected_seal: Seal


@dataclass(frozen=True, slots=True)
class Range:
    """A run of file bytes."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class CommitContent:
    """Edit a file's extent map: cut at `cut`, clear ranges, add rows; then set size and seal.

    PreconditionFailed unless the inode is at `expected_version`, where it ends at one more, and
    its seal is `expected_seal` (empty: any).
    """

    TAG: ClassVar[int] = 7
    inode: int
    expected_version: int
    cut: int
    """Rows at or past this offset go first: the smallest size since the last commit."""
    size: int
    allocated: int
    cleared: Annotated[tuple[Range, ...], Max(MAP_PAGE_ROWS_MAX)]
    rows: Annotated[tuple[Row, ...], Max(MAP_PAGE_ROWS_MAX)]
    attributes: Attributes
    seal: Seal
    expected_seal: Seal


@dataclass(frozen=True, slots=True)
class SetXattr:
    """Set an encrypted extended attribute, or remove it when `value` is None.

    PreconditionFailed unless it is there already, or not, as `was_there` says (None: either).
    """

    TAG: ClassVar[int] = 8
    inode: int
    name: EncryptedName
    value: Annotated[bytes, Max(XATTR_VALUE_BYTES_MAX + 64)] | None
    was_there: bool | None


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an extent's ciphertext lies; `segment_id` is zero for an inline extent."""

    extent_id: ExtentID
    segment_id: SegmentID
    offset: int
    ciphertext_bytes: int


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """A receipt and the index it was uploaded as."""

    index: int
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class PutSegment:
    """Register an uploaded segment with its receipts and the extents in it."""

    TAG: ClassVar[int] = 9
    segment_id: SegmentID
    size: int
    root: Hash
    pieces: Annotated[tuple[StoredPiece, ...], Max(PIECES_PER_SEGMENT_MAX)]
    placements: Annotated[tuple[Placement, ...], Max(MAP_PAGE_ROWS_MAX)]


@dataclass(frozen=True, slots=True)
class PutInline:
    """Store a small extent's ciphertext in the satellite's database until it is packed."""

    TAG: ClassVar[int] = 10
    extent_id: ExtentID
    ciphertext: Annotated[bytes, Max(2 * XATTR_VALUE_BYTES_MAX)]


@dataclass(frozen=True, slots=True)
class Reap:
    """Drop an inode without dentries: its last handle is closed."""

    TAG: ClassVar[int] = 11
    inode: int


@dataclass(frozen=True, slots=True)
class Touch:
    """Set times alone, which no seal covers: for what a change beside the inode does to it."""

    TAG: ClassVar[int] = 12
    inode: int
    mtime_ns: int | None
    ctime_ns: int


Operation = (
    Create
    | Link
    | Unlink
    | Rename
    | Exchange
    | SetAttributes
    | CommitContent
    | SetXattr
    | PutSegment
    | PutInline
    | Reap
    | Touch
)


def loses_a_name(operation: Operation) -> int:
    """The inode that an operation takes a name from and gives none; 0 if it does not do that."""
    match operation:
        case Unlink():
            return operation.inode
        case Rename():
            return operation.replaced
        case _:
            return 0


@dataclass(frozen=True, slots=True)
class ApplyRequest:
    """A batch of operations of a session, in order.

    Idempotent: the last (sequence, chain) is kept with its result in the same transaction. If
    `atomic`, one failure undoes all; otherwise each item stands alone. A `direct` batch (written
    through, not logged by the client) has a sequence of its own and no chain.
    """

    api_key: ApiKey
    session_id: SessionID
    sequence: int
    chain: Hash
    atomic: bool
    direct: bool
    operations: Annotated[tuple[Operation, ...], Max(APPLY_OPERATIONS_MAX)]


@dataclass(frozen=True, slots=True)
class OperationResult:
    """0 and an empty text for success, else an error number of `network.errors`."""

    code: int
    text: Text


@dataclass(frozen=True, slots=True)
class ApplyResponse:
    """Results in order; with `atomic` and a failure, nothing was changed."""

    results: Annotated[tuple[OperationResult, ...], Max(APPLY_OPERATIONS_MAX)]


@dataclass(frozen=True, slots=True)
class ProjectRequest:
    """Ask for what is common to a project."""

    api_key: ApiKey


@dataclass(frozen=True, slots=True)
class ProjectResponse:
    """The project's passphrase salt (16 bytes) and name."""

    salt: Annotated[bytes, Max(32)]
    name: Text


@dataclass(frozen=True, slots=True)
class CreateBucketRequest:
    """Make a bucket with its root directory; the satellite draws nothing, the client all keys."""

    api_key: ApiKey
    name: BucketName
    bucket_id: Annotated[bytes, Max(16)]
    wrapped_root_key: WrappedKey
    root: NewInode


@dataclass(frozen=True, slots=True)
class BucketRequest:
    """Name a bucket."""

    api_key: ApiKey
    name: BucketName


@dataclass(frozen=True, slots=True)
class SchemeWire:
    """A redundancy scheme."""

    required: int
    repair: int
    success: int
    total: int


@dataclass(frozen=True, slots=True)
class BucketInfo:
    """A bucket and its root directory."""

    name: BucketName
    bucket_id: Annotated[bytes, Max(16)]
    wrapped_root_key: WrappedKey
    root: InodeRecord
    created_ns: int
    live_bytes: int
    scheme: SchemeWire
    """Of new segments; each stored segment keeps its own."""
    quota_bytes: int
    """Bytes of content, without holes, that it may hold; 0: any number."""
    used_bytes: int


@dataclass(frozen=True, slots=True)
class BucketList:
    """All buckets the key may see, by name."""

    buckets: Annotated[tuple[BucketInfo, ...], Max(LIST_PAGE_ENTRIES_MAX)]


@dataclass(frozen=True, slots=True)
class OpenSessionRequest:
    """Open or reclaim a read-write session; a lease that another one holds is recalled first.

    `cache_id` names the cache directory: the same one reclaims its session at once. An exclusive
    session shares the bucket with no other.
    """

    api_key: ApiKey
    bucket: BucketName
    cache_id: Annotated[bytes, Max(16)]
    host: Text
    pid: int
    is_exclusive: bool


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """An open session, where its log stands, and the numbers granted to it."""

    session_id: SessionID
    last_sequence: int
    last_chain: Hash
    direct_sequence: int
    holds_lease: bool
    first_number: int
    """First of `number_count` numbers for inodes and dentries."""
    number_count: int


@dataclass(frozen=True, slots=True)
class SessionRequest:
    """Renew or close a session."""

    api_key: ApiKey
    session_id: SessionID


@dataclass(frozen=True, slots=True)
class LookupRequest:
    """Find one name in a directory."""

    api_key: ApiKey
    bucket: BucketName
    parent: int
    name: EncryptedName


@dataclass(frozen=True, slots=True)
class InodeRequest:
    """Name an inode of a bucket."""

    api_key: ApiKey
    bucket: BucketName
    inode: int


@dataclass(frozen=True, slots=True)
class ListRequest:
    """A page of a directory after a dentry id."""

    api_key: ApiKey
    bucket: BucketName
    parent: int
    after: int
    limit: int


@dataclass(frozen=True, slots=True)
class ListResponse:
    """Entries in dentry id order; `more` if there is another page."""

    entries: Annotated[tuple[EntryRecord, ...], Max(LIST_PAGE_ENTRIES_MAX)]
    more: bool


@dataclass(frozen=True, slots=True)
class PathStep:
    """One of an inode's dentries and the directory it stands in."""

    parent: int
    entry: EntryRecord


@dataclass(frozen=True, slots=True)
class PathResponse:
    """Steps from an inode upwards: each one's parent is the next one's inode.

    Ends at the root, or at the page's limit: ask again for the last parent.
    """

    steps: Annotated[tuple[PathStep, ...], Max(PATH_PAGE_ENTRIES_MAX)]


@dataclass(frozen=True, slots=True)
class MapRequest:
    """A page of a file's extent map from a file offset on."""

    api_key: ApiKey
    bucket: BucketName
    inode: int
    after: int


@dataclass(frozen=True, slots=True)
class MapResponse:
    """Rows in order with the placements of their extents."""

    inode: InodeRecord
    rows: Annotated[tuple[Row, ...], Max(MAP_PAGE_ROWS_MAX)]
    placements: Annotated[tuple[Placement, ...], Max(MAP_PAGE_ROWS_MAX)]
    more: bool


@dataclass(frozen=True, slots=True)
class Xattr:
    """An encrypted extended attribute."""

    name: EncryptedName
    value: Annotated[bytes, Max(XATTR_VALUE_BYTES_MAX + 64)]


@dataclass(frozen=True, slots=True)
class XattrResponse:
    """All extended attributes of an inode."""

    xattrs: Annotated[tuple[Xattr, ...], Max(XATTRS_PER_INODE_MAX)]


@dataclass(frozen=True, slots=True)
class PieceGrant:
    """Permission to use one node for one piece."""

    index: int
    """The piece's index for a download; the offer's number for an upload."""
    address: PeerAddress
    node_key: PublicKey
    limit: OrderLimit
    proof: SignedRoot


@dataclass(frozen=True, slots=True)
class BeginSegmentRequest:
    """Ask for nodes for a new segment of `size` ciphertext bytes."""

    api_key: ApiKey
    session_id: SessionID
    size: int
    avoid: Annotated[tuple[NodeID, ...], Max(PIECES_PER_SEGMENT_MAX)]


@dataclass(frozen=True, slots=True)
class SegmentGrant:
    """A segment to write or read: scheme, nodes, and the key to sign orders with."""

    segment_id: SegmentID
    scheme: SchemeWire
    size: int
    root: Hash
    """Zero for an upload."""
    order_key: Annotated[bytes, Max(32)]
    grants: Annotated[tuple[PieceGrant, ...], Max(1024)]


@dataclass(frozen=True, slots=True)
class OpenSegmentsRequest:
    """Ask for GET limits for segments of a bucket."""

    api_key: ApiKey
    bucket: BucketName
    segment_ids: Annotated[tuple[SegmentID, ...], Max(LOCATE_SEGMENTS_MAX)]


@dataclass(frozen=True, slots=True)
class OpenSegmentsResponse:
    """Grants in the order asked."""

    segments: Annotated[tuple[SegmentGrant, ...], Max(LOCATE_SEGMENTS_MAX)]


@dataclass(frozen=True, slots=True)
class InlineRequest:
    """Ask for an inline extent's ciphertext."""

    api_key: ApiKey
    bucket: BucketName
    extent_id: ExtentID


@dataclass(frozen=True, slots=True)
class InlineResponse:
    """The ciphertext."""

    ciphertext: Annotated[bytes, Max(2 * XATTR_VALUE_BYTES_MAX)]


@dataclass(frozen=True, slots=True)
class ReportNodeRequest:
    """Say that a node served bytes that do not match the segment root."""

    api_key: ApiKey
    segment_id: SegmentID
    index: int
    node_id: NodeID


@dataclass(frozen=True, slots=True)
class CheckInRequest:
    """A node's state; the caller's certificate says which node."""

    host: Text
    port: int
    capacity_bytes: int
    stored_bytes: int
    version: Text


@dataclass(frozen=True, slots=True)
class CheckInResponse:
    """The satellite's clock, so that a node can see its own is wrong."""

    now_s: int
    satellite_key: PublicKey


@dataclass(frozen=True, slots=True)
class NodeReport:
    """A node as the satellite sees it."""

    node_id: NodeID
    host: Text
    port: int
    online: bool
    last_check_in_s: int
    capacity_bytes: int
    stored_bytes: int
    pieces: int
    bad_shares: int


@dataclass(frozen=True, slots=True)
class SatelliteStatus:
    """Counts and nodes; only for the satellite's own identity."""

    address: Text
    nodes: Annotated[tuple[NodeReport, ...], Max(65536)]
    segments: int
    live_bytes: int
    inodes: int
    transactions: int


@dataclass(frozen=True, slots=True)
class SetQuotaRequest:
    """Limit a bucket's content; only for the satellite's own identity."""

    project: Text
    bucket: BucketName
    quota_bytes: int
    """0: any number of bytes."""


@dataclass(frozen=True, slots=True)
class SetQuotaResponse:
    """What the bucket holds now."""

    used_bytes: int


PROJECT = Method(16, ProjectRequest, ProjectResponse)
CREATE_BUCKET = Method(17, CreateBucketRequest, BucketInfo)
GET_BUCKET = Method(18, BucketRequest, BucketInfo)
LIST_BUCKETS = Method(19, ProjectRequest, BucketList)
DELETE_BUCKET = Method(20, BucketRequest, Empty)
OPEN_SESSION = Method(21, OpenSessionRequest, SessionInfo, OPEN_SESSION_DEADLINE_S)
RENEW_SESSION = Method(22, SessionRequest, Empty)
CLOSE_SESSION = Method(23, SessionRequest, Empty)
LOOKUP = Method(24, LookupRequest, EntryRecord)
GET_INODE = Method(25, InodeRequest, InodeRecord)
LIST_DIRECTORY = Method(26, ListRequest, ListResponse)
GET_MAP = Method(27, MapRequest, MapResponse)
GET_XATTRS = Method(28, InodeRequest, XattrResponse)
APPLY = Method(29, ApplyRequest, ApplyResponse, APPLY_DEADLINE_S)
BEGIN_SEGMENT = Method(30, BeginSegmentRequest, SegmentGrant)
OPEN_SEGMENTS = Method(31, OpenSegmentsRequest, OpenSegmentsResponse)
GET_INLINE = Method(32, InlineRequest, InlineResponse)
REPORT_NODE = Method(33, ReportNodeRequest, Empty)
CHECK_IN = Method(34, CheckInRequest, CheckInResponse)
SATELLITE_STATUS = Method(35, Empty, SatelliteStatus)
FIND_PATH = Method(38, InodeRequest, PathResponse)
SET_QUOTA = Method(39, SetQuotaRequest, SetQuotaResponse)

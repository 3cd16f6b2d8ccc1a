"""The channel between a session and its satellite: what others changed, and who may answer alone.

After SUBSCRIBE the connection carries DATA frames both ways, each a `ToServer` or a `ToClient` as
its header (docs/specs/coherence.md). A client trusts what it has cached for TRUST_S after it sent
the last ping that was answered; the satellite answers a writer once every other session has
acknowledged the change, or can trust nothing any more.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from network.codec import Max
from network.ids import SessionID
from network.limits import APPLY_OPERATIONS_MAX, CHANNEL_LIFE_S, ORPHANS_ASKED_MAX
from network.messages import ApiKey, EncryptedName
from network.method import Method, StreamEnd


@dataclass(frozen=True, slots=True)
class Change:
    """Something is no longer what it was: a name in a directory, or (empty name) an inode."""

    inode: int
    """The directory, or the inode itself."""
    name: EncryptedName


@dataclass(frozen=True, slots=True)
class SubscribeRequest:
    """Open the channel of a session; an older one of the same session is closed."""

    api_key: ApiKey
    session_id: SessionID


@dataclass(frozen=True, slots=True)
class Welcome:
    """First frame to the client: whether the session holds the bucket's write lease."""

    TAG: ClassVar[int] = 1
    holds_lease: bool


@dataclass(frozen=True, slots=True)
class Pong:
    """Answers the ping of that number."""

    TAG: ClassVar[int] = 2
    number: int
    is_alone: bool
    """No other session is active: the lease may be asked for."""


@dataclass(frozen=True, slots=True)
class Event:
    """Changes committed by another session; acknowledge once no cache shows the old state."""

    TAG: ClassVar[int] = 3
    number: int
    changes: Annotated[tuple[Change, ...], Max(4 * APPLY_OPERATIONS_MAX)]


@dataclass(frozen=True, slots=True)
class Recall:
    """Another session is opening: commit all namespace operations, then send Released."""

    TAG: ClassVar[int] = 4


@dataclass(frozen=True, slots=True)
class Orphans:
    """Asks which of these inodes, that have no names any more, the session still needs."""

    TAG: ClassVar[int] = 5
    number: int
    inodes: Annotated[tuple[int, ...], Max(ORPHANS_ASKED_MAX)]


@dataclass(frozen=True, slots=True)
class Ping:
    """Asks for a pong; numbers grow."""

    TAG: ClassVar[int] = 1
    number: int


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """All events up to this number have been taken in."""

    TAG: ClassVar[int] = 2
    number: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """A file whose content is still to come, in so many commits."""

    inode: int
    commits: int


@dataclass(frozen=True, slots=True)
class Released:
    """The lease is given back: all names and attributes answered so far are committed.

    Until the reserved files' content is there, others cannot commit to them.
    """

    TAG: ClassVar[int] = 3
    reserved: Annotated[tuple[Reservation, ...], Max(65536)]


@dataclass(frozen=True, slots=True)
class Held:
    """Answers the Orphans of that number: those that are open, or have content staged."""

    TAG: ClassVar[int] = 4
    number: int
    inodes: Annotated[tuple[int, ...], Max(ORPHANS_ASKED_MAX)]


@dataclass(frozen=True, slots=True)
class ToClient:
    """A frame from the satellite."""

    frame: Welcome | Pong | Event | Recall | Orphans


@dataclass(frozen=True, slots=True)
class ToServer:
    """A frame from the session."""

    frame: Ping | Acknowledge | Released | Held


@dataclass(frozen=True, slots=True)
class AcquireLeaseRequest:
    """Ask for the write lease while alone.

    Inodes without names are dropped at the satellite, but those the session holds open.
    """

    api_key: ApiKey
    session_id: SessionID
    open_orphans: Annotated[tuple[int, ...], Max(65536)]


@dataclass(frozen=True, slots=True)
class AcquireLeaseResponse:
    """Whether the session holds the lease now."""

    holds_lease: bool


SUBSCRIBE = Method(36, SubscribeRequest, StreamEnd, CHANNEL_LIFE_S)
ACQUIRE_LEASE = Method(37, AcquireLeaseRequest, AcquireLeaseResponse)

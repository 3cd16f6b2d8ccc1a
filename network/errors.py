"""The exception tree shared by all peers; each class is one decision a caller can make.

    DcsError
      ProtocolError          a peer sent something the protocol does not allow
      Unauthenticated        the API key is unknown or its signature is wrong
      PermissionDenied       the API key's caveats forbid this
      NotFound  AlreadyExists  NotADirectory  IsADirectory  NotEmpty  InvalidArgument  NameTooLong
      PreconditionFailed     the state a commit was based on has changed
      BucketBusy             another read-write session holds the bucket
      SessionLost            this session has expired and others are at work: open it again
      SequenceConflict       the session's log is a copy: another one has gone on from it
      Reserved               another session has older content for the file, which comes first
      NodeFull  OrderRefused  LimitExceeded        a storage node's reasons
      IntegrityError         bytes do not match their hash, seal or tag
        WrongPassphrase
      Unavailable            the peer cannot be reached
        DeadlineExceeded
      NotEnoughNodes  TooFewShares
      QuotaExceeded
      Internal               the peer's own fault; details are in its log

Every class has a number that travels on the wire. Nobody parses the text.
"""

from typing import ClassVar


class DcsError(Exception):
    """Root of the tree; `str()` is a sentence for people, without a trailing full stop."""

    code: ClassVar[int] = 0


class ProtocolError(DcsError):
    """A peer broke the protocol; the connection is not used again."""

    code = 1


class Unauthenticated(DcsError):
    """The API key is unknown, revoked or forged."""

    code = 2


class PermissionDenied(DcsError):
    """The API key does not allow the operation."""

    code = 3


class NotFound(DcsError):
    """The thing named does not exist."""

    code = 4


class AlreadyExists(DcsError):
    """The name is taken."""

    code = 5


class NotADirectory(DcsError):
    """A directory was expected."""

    code = 6


class IsADirectory(DcsError):
    """Anything but a directory was expected."""

    code = 7


class NotEmpty(DcsError):
    """A directory or bucket still has entries."""

    code = 8


class InvalidArgument(DcsError):
    """A value is malformed or out of range; nothing was changed."""

    code = 9


class PreconditionFailed(DcsError):
    """The state that a commit was based on has changed."""

    code = 10


class BucketBusy(DcsError):
    """Another read-write session holds the bucket; the text names its host and pid."""

    code = 11


class SessionLost(DcsError):
    """The session has expired and others are at work: it must be opened again."""

    code = 12


class NodeFull(DcsError):
    """The storage node has no room."""

    code = 13


class OrderRefused(DcsError):
    """An order or order limit is forged, expired, replayed or meant for somebody else."""

    code = 14


class LimitExceeded(DcsError):
    """A byte limit or a protocol limit would be passed."""

    code = 15


class IntegrityError(DcsError):
    """Bytes do not match their hash, authentication tag or seal."""

    code = 16


class WrongPassphrase(IntegrityError):
    """The bucket's root key does not open with this passphrase."""

    code = 17


class Unavailable(DcsError):
    """The peer cannot be reached or closed the connection."""

    code = 18


class DeadlineExceeded(Unavailable):
    """The peer did not answer in time."""

    code = 19


class NotEnoughNodes(DcsError):
    """Too few storage nodes are online for the redundancy scheme."""

    code = 20


class TooFewShares(DcsError):
    """Fewer than k intact pieces of a segment can be reached."""

    code = 21


class QuotaExceeded(DcsError):
    """The project's quota is used up."""

    code = 22


class NameTooLong(DcsError):
    """A name is longer than 255 bytes."""

    code = 23


class Internal(DcsError):
    """The peer failed; its log has the details."""

    code = 24


class SequenceConflict(DcsError):
    """A batch does not follow the last one: the cache directory was copied or restored."""

    code = 25


class Reserved(DcsError):
    """Another session has staged content for the file before: it comes first; try again."""

    code = 26


def _all_classes(root: type[DcsError]) -> list[type[DcsError]]:
    found = [root]
    for child in root.__subclasses__():
        found += _all_classes(child)
    return found


_BY_CODE = {cls.code: cls for cls in _all_classes(DcsError)}


def error_from_wire(code: int, text: str) -> DcsError:
    """Rebuild a peer's error; an unknown code becomes Internal with the code in its text."""
    cls = _BY_CODE.get(code)
    if cls is None:
        return Internal(f"unknown error {code}: {text}")
    return cls(text)

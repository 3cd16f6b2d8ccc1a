"""`apply`: a session's batch of operations, idempotent by (sequence, chain)."""

from collections.abc import Callable
from typing import Any

from network.codec import pack, unpack
from network.coherence import Change
from network.errors import DcsError, SequenceConflict
from network.ids import Hash
from network.messages import (
    ApplyRequest,
    ApplyResponse,
    CommitContent,
    Create,
    Exchange,
    Link,
    Operation,
    OperationResult,
    PutInline,
    PutSegment,
    Reap,
    Rename,
    SetAttributes,
    SetXattr,
    Touch,
    Unlink,
)
from satellite.db.database import Transaction
from satellite.metabase import dentries, extents, inodes, segments, sessions

_SUCCESS = OperationResult(0, "")


def _commit_content(tx: Transaction, bucket_id: int, op: CommitContent) -> None:
    inodes.check_seal(tx, bucket_id, op.inode, op.expected_seal)
    extents.apply_commit_content(tx, bucket_id, op)
    inodes.set_attributes(tx, bucket_id, op.inode, op.attributes, op.seal)


def changes_of(request: ApplyRequest, response: ApplyResponse) -> tuple[Change, ...]:
    """What other sessions must forget after this batch. Pure."""
    if request.atomic and any(result.code for result in response.results):
        return ()
    found: dict[Change, None] = {}
    for op, result in zip(request.operations, response.results, strict=False):
        if result.code == 0:
            found |= dict.fromkeys(Change(inode, name) for inode, name in _touched_by(op))
    return tuple(found)


def _touched_by(op: Operation) -> list[tuple[int, bytes]]:
    """(directory, name) and (inode, empty) pairs whose state an operation has changed."""
    match op:
        case Create():
            return [(op.parent, op.name)]
        case Link() | Unlink():
            return [(op.parent, op.name), (op.inode, b"")]
        case Rename():
            names = [(op.parent, op.name), (op.new_parent, op.new_name), (op.inode, b"")]
            return [*names, (op.replaced, b"")] if op.replaced else names
        case Exchange():
            return [
                (op.parent, op.name), (op.other_parent, op.other_name),
                (op.inode, b""), (op.other_inode, b""),
            ]  # fmt: skip
        case SetAttributes() | CommitContent() | SetXattr() | Touch():
            return [(op.inode, b"")]
        case PutSegment() | PutInline() | Reap():
            return []


def _reap(tx: Transaction, bucket_id: int, op: Reap) -> None:
    inodes.reap(tx, bucket_id, op.inode)


_APPLIERS: dict[type[Any], Callable[[Transaction, int, Any], None]] = {
    Create: dentries.apply_create,
    Link: dentries.apply_link,
    Unlink: dentries.apply_unlink,
    Rename: dentries.apply_rename,
    Exchange: dentries.apply_exchange,
    SetAttributes: inodes.apply_set_attributes,
    CommitContent: _commit_content,
    SetXattr: inodes.apply_set_xattr,
    PutSegment: segments.apply_put_segment,
    PutInline: extents.apply_put_inline,
    Reap: _reap,
    Touch: inodes.apply_touch,
}


def _apply_one(
    tx: Transaction, session: sessions.Session, op: Operation, now_s: int
) -> OperationResult:
    tx.execute("SAVEPOINT operation")
    try:
        if isinstance(op, CommitContent):
            sessions.use_reservation(tx, session, op.inode, now_s)
        _APPLIERS[type(op)](tx, session.bucket_id, op)
    except DcsError as error:
        tx.execute("ROLLBACK TO operation")
        tx.execute("RELEASE operation")
        return OperationResult(error.code, str(error)[:250])
    tx.execute("RELEASE operation")
    return _SUCCESS


def apply(
    tx: Transaction, session: sessions.Session, request: ApplyRequest, now_s: int
) -> ApplyResponse:
    """Apply a batch or return the kept result of the one applied last.

    Raises SequenceConflict for a sequence that is not the next one, or whose chain differs
    from what was applied: the client's log is a fork.
    """
    last, kept = (
        (session.direct_sequence, session.direct_result)
        if request.direct
        else (session.last_sequence, session.last_result)
    )
    if request.sequence == last:
        if not request.direct and request.chain != Hash(session.last_chain):
            raise SequenceConflict("this cache directory is a copy: its log has forked")
        return unpack(ApplyResponse, kept)
    if request.sequence != last + 1:
        raise SequenceConflict(f"batch {request.sequence} does not follow batch {last}")
    results: list[OperationResult] = []
    tx.execute("SAVEPOINT batch")
    for op in request.operations:
        if isinstance(op, Reap) and session.others:
            results.append(_SUCCESS)  # another session may have it open: dropped at the next lease
            continue
        result = _apply_one(tx, session, op, now_s)
        results.append(result)
        if result.code and request.atomic:
            tx.execute("ROLLBACK TO batch")
            tx.execute("RELEASE batch")
            return ApplyResponse(tuple(results))  # nothing happened: the sequence stays free
    tx.execute("RELEASE batch")
    response = ApplyResponse(tuple(results))
    sessions.record_batch(tx, session, request, pack(response))
    return response

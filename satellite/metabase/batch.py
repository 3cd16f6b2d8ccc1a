"""`apply`: a session's batch of operations, idempotent by (sequence, chain)."""

from collections.abc import Callable
from typing import Any

from network.codec import pack, unpack
from network.errors import DcsError, PreconditionFailed
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
    Unlink,
)
from satellite.db.database import Transaction
from satellite.metabase import dentries, extents, inodes, segments, sessions

_SUCCESS = OperationResult(0, "")


def _commit_content(tx: Transaction, bucket_id: int, op: CommitContent) -> None:
    extents.apply_commit_content(tx, bucket_id, op)
    inodes.set_attributes(tx, bucket_id, op.inode, op.attributes, op.seal)


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
}


def _apply_one(tx: Transaction, bucket_id: int, op: Operation) -> OperationResult:
    tx.execute("SAVEPOINT operation")
    try:
        _APPLIERS[type(op)](tx, bucket_id, op)
    except DcsError as error:
        tx.execute("ROLLBACK TO operation")
        tx.execute("RELEASE operation")
        return OperationResult(error.code, str(error)[:250])
    tx.execute("RELEASE operation")
    return _SUCCESS


def apply(tx: Transaction, session: sessions.Session, request: ApplyRequest) -> ApplyResponse:
    """Apply a batch or return the kept result of the one applied last.

    Raises PreconditionFailed for a sequence that is not the next one, or whose chain differs
    from what was applied: the client's log is a fork.
    """
    if request.sequence == session.last_sequence:
        if request.chain != Hash(session.last_chain):
            raise PreconditionFailed("this cache directory is a copy: its log has forked")
        return unpack(ApplyResponse, session.last_result)
    if request.sequence != session.last_sequence + 1:
        raise PreconditionFailed(
            f"batch {request.sequence} does not follow batch {session.last_sequence}"
        )
    results: list[OperationResult] = []
    tx.execute("SAVEPOINT batch")
    for op in request.operations:
        result = _apply_one(tx, session.bucket_id, op)
        results.append(result)
        if result.code and request.atomic:
            tx.execute("ROLLBACK TO batch")
            tx.execute("RELEASE batch")
            return ApplyResponse(tuple(results))  # nothing happened: the sequence stays free
    tx.execute("RELEASE batch")
    response = ApplyResponse(tuple(results))
    sessions.record_batch(tx, session, request.sequence, request.chain, pack(response))
    return response

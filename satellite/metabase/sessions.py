"""Read-write sessions: one active per bucket, reclaimed by cache directory, expiring."""

from dataclasses import dataclass

from network.errors import BucketBusy, SessionLost
from network.ids import Hash, SessionID
from network.limits import INODE_GRANT_COUNT, SESSION_LIFE_S
from network.messages import OpenSessionRequest, SessionInfo
from satellite.db.database import Transaction
from satellite.metabase import inodes


@dataclass(frozen=True, slots=True)
class Session:
    """An active session."""

    session_id: SessionID
    bucket_id: int
    last_sequence: int
    last_chain: bytes
    last_result: bytes


def open_session(
    tx: Transaction, bucket_id: int, request: OpenSessionRequest, new_id: SessionID, now_s: int
) -> SessionInfo:
    """Open or reclaim; raises BucketBusy naming the holder's host and pid."""
    holder = tx.one(
        "SELECT cache_id, host, pid FROM session WHERE bucket_id=? AND expires_s>?",
        (bucket_id, now_s),
    )
    if holder is not None and holder[0] != request.cache_id:
        raise BucketBusy(
            f"bucket {request.bucket!r} is open for writing on host {holder[1]!s}, process "
            f"{int(holder[2])}; mount it read-only (-o ro), or unmount it there first"
        )
    tx.execute("UPDATE session SET expires_s=0 WHERE bucket_id=?", (bucket_id,))
    if holder is None:
        inodes.reap_all(tx, bucket_id)
    expires = now_s + int(SESSION_LIFE_S)
    row = tx.one(
        "SELECT session_id, last_sequence, last_chain FROM session"
        " WHERE bucket_id=? AND cache_id=?",
        (bucket_id, request.cache_id),
    )
    if row is None:
        session_id, sequence, chain = new_id, 0, bytes(32)
        tx.execute(
            "INSERT INTO session VALUES (?,?,?,?,?,?,0,?,?)",
            (
                session_id, bucket_id, request.cache_id, request.host, request.pid, expires,
                chain, b"",
            ),
        )  # fmt: skip
    else:
        assert isinstance(row[0], bytes)
        assert isinstance(row[2], bytes)
        session_id, sequence, chain = SessionID(row[0]), int(row[1]), row[2]
        tx.execute(
            "UPDATE session SET host=?, pid=?, expires_s=? WHERE session_id=?",
            (request.host, request.pid, expires, session_id),
        )
    first = tx.number("SELECT next_number FROM bucket WHERE bucket_id=?", (bucket_id,))
    tx.execute(
        "UPDATE bucket SET next_number=next_number+? WHERE bucket_id=?",
        (INODE_GRANT_COUNT, bucket_id),
    )
    return SessionInfo(session_id, sequence, Hash(chain), first, INODE_GRANT_COUNT)


def get_active(tx: Transaction, project_id: int, session_id: SessionID, now_s: int) -> Session:
    """An active session of the project; raises SessionLost.

    An expired session that nobody replaced is still its owner's.
    """
    row = tx.one(
        "SELECT session.bucket_id, expires_s, last_sequence, last_chain, last_result"
        " FROM session JOIN bucket ON bucket.bucket_id=session.bucket_id"
        " WHERE session_id=? AND project_id=?",
        (session_id, project_id),
    )
    if row is None or row[1] == 0:
        raise SessionLost("the session on this bucket has ended; another writer may hold it")
    assert isinstance(row[3], bytes)
    assert isinstance(row[4], bytes)
    return Session(session_id, int(row[0]), int(row[2]), row[3], row[4])


def renew(tx: Transaction, session_id: SessionID, now_s: int) -> None:
    """Extend an active session by its life."""
    tx.execute(
        "UPDATE session SET expires_s=? WHERE session_id=?",
        (now_s + int(SESSION_LIFE_S), session_id),
    )


def close(tx: Transaction, session: Session) -> None:
    """End a session for good: its client has nothing left to send."""
    inodes.reap_all(tx, session.bucket_id)
    tx.execute("DELETE FROM session WHERE session_id=?", (session.session_id,))


def record_batch(
    tx: Transaction, session: Session, sequence: int, chain: bytes, result: bytes
) -> None:
    """Keep the batch just applied, in its own transaction."""
    tx.execute(
        "UPDATE session SET last_sequence=?, last_chain=?, last_result=? WHERE session_id=?",
        (sequence, chain, result, session.session_id),
    )
    tx.execute(
        "UPDATE bucket SET transactions=transactions+1 WHERE bucket_id=?", (session.bucket_id,)
    )

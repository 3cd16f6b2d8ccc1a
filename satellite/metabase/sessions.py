"""Read-write sessions: several per bucket, of which at most one holds the write lease.

The holder answers namespace operations from its own state. A lease ends by being given back, by
being taken after the recall deadline, or with its session's life; it is kept in the database, so
it survives a restart of the satellite.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from network.coherence import Reservation
from network.errors import BucketBusy, Reserved, SessionLost
from network.ids import Hash, SessionID
from network.limits import INODE_GRANT_COUNT, SESSION_LIFE_S
from network.messages import ApplyRequest, OpenSessionRequest, SessionInfo
from satellite.db.database import Transaction
from satellite.metabase import inodes


@dataclass(frozen=True, slots=True)
class Session:
    """A session and the others that are active on its bucket."""

    session_id: SessionID
    bucket_id: int
    last_sequence: int
    last_chain: bytes
    last_result: bytes
    direct_sequence: int
    direct_result: bytes
    others: tuple[SessionID, ...]


def others_active(
    tx: Transaction, bucket_id: int, cache_id: bytes, now_s: int
) -> list[tuple[SessionID, bool]]:
    """(id, whether it holds the lease) of active sessions with other cache directories."""
    rows = tx.all(
        "SELECT session_id, holds_lease FROM session"
        " WHERE bucket_id=? AND cache_id<>? AND expires_s>?",
        (bucket_id, cache_id, now_s),
    )
    return [(SessionID(_blob(row[0])), bool(row[1])) for row in rows]


def active_without_lease(tx: Transaction, bucket_id: int, now_s: int) -> tuple[SessionID, ...]:
    """The active sessions of a bucket in a fixed order; none if one of them holds the lease."""
    rows = tx.all(
        "SELECT session_id, holds_lease FROM session WHERE bucket_id=? AND expires_s>?"
        " ORDER BY session_id",
        (bucket_id, now_s),
    )
    if any(row[1] for row in rows):
        return ()
    return tuple(SessionID(_blob(row[0])) for row in rows)


def _blob(value: int | str | bytes | None) -> bytes:
    assert isinstance(value, bytes)
    return value


def check_exclusive(
    tx: Transaction, bucket_id: int, request: OpenSessionRequest, now_s: int
) -> None:
    """Raise BucketBusy, naming the holder, when one of the two sessions wants the bucket alone."""
    other = tx.one(
        "SELECT host, pid, is_exclusive FROM session"
        " WHERE bucket_id=? AND cache_id<>? AND expires_s>? ORDER BY is_exclusive DESC",
        (bucket_id, request.cache_id, now_s),
    )
    if other is None or not (request.is_exclusive or other[2]):
        return
    who = f"host {other[0]!s}, process {int(other[1])}"
    if other[2]:
        raise BucketBusy(
            f"bucket {request.bucket!r} is mounted exclusively on {who}; mount it read-only "
            "(-o ro), or unmount it there first"
        )
    raise BucketBusy(
        f"bucket {request.bucket!r} is open for writing on {who}: it cannot be mounted "
        "exclusively; leave out -o exclusive, or unmount it there first"
    )


def open_session(
    tx: Transaction, bucket_id: int, request: OpenSessionRequest, new_id: SessionID, now_s: int
) -> SessionInfo:
    """Open or reclaim, once no other session holds the lease; the first one gets it.

    A session whose lease was taken, or given back, begins without one also when the others have
    left: it must compare what it has staged with what they did, and asks for the lease then.
    """
    check_exclusive(tx, bucket_id, request, now_s)
    others = others_active(tx, bucket_id, request.cache_id, now_s)
    take_leases(tx, bucket_id, request.cache_id)
    if not others:
        inodes.reap_all(tx, bucket_id)
    expires = now_s + int(SESSION_LIFE_S)
    row = tx.one(
        "SELECT session_id, last_sequence, last_chain, direct_sequence, holds_lease FROM session"
        " WHERE bucket_id=? AND cache_id=?",
        (bucket_id, request.cache_id),
    )
    holds_lease = not others and (row is None or bool(row[4]))
    if row is None:
        session_id, sequence, chain, direct = new_id, 0, bytes(32), 0
        tx.execute(
            "INSERT INTO session (session_id, bucket_id, cache_id, host, pid, expires_s,"
            " last_sequence, last_chain, last_result, is_exclusive, holds_lease)"
            " VALUES (?,?,?,?,?,?,0,?,?,?,?)",
            (
                session_id, bucket_id, request.cache_id, request.host, request.pid, expires,
                chain, b"", int(request.is_exclusive), int(holds_lease),
            ),
        )  # fmt: skip
    else:
        session_id, sequence, chain = SessionID(_blob(row[0])), int(row[1]), _blob(row[2])
        direct = int(row[3])
        tx.execute(
            "UPDATE session SET host=?, pid=?, expires_s=?, is_exclusive=?, holds_lease=?"
            " WHERE session_id=?",
            (
                request.host, request.pid, expires, int(request.is_exclusive), int(holds_lease),
                session_id,
            ),
        )  # fmt: skip
    first = tx.number("SELECT next_number FROM bucket WHERE bucket_id=?", (bucket_id,))
    tx.execute(
        "UPDATE bucket SET next_number=next_number+? WHERE bucket_id=?",
        (INODE_GRANT_COUNT, bucket_id),
    )
    return SessionInfo(
        session_id, sequence, Hash(chain), direct, holds_lease, first, INODE_GRANT_COUNT
    )


def get(tx: Transaction, project_id: int, session_id: SessionID, now_s: int) -> Session:
    """A session of the project that may change its bucket; raises SessionLost.

    An expired session is still its owner's as long as nobody else is active.
    """
    row = tx.one(
        "SELECT session.bucket_id, cache_id, expires_s, last_sequence, last_chain, last_result,"
        " direct_sequence, direct_result"
        " FROM session JOIN bucket ON bucket.bucket_id=session.bucket_id"
        " WHERE session_id=? AND project_id=?",
        (session_id, project_id),
    )
    if row is None:
        raise SessionLost("this session has ended; it must be opened again")
    bucket_id, cache_id, expires, sequence, chain, result, direct, direct_result = row
    others = others_active(tx, int(bucket_id), _blob(cache_id), now_s)
    if int(expires) <= now_s and others:
        raise SessionLost("this session has expired, and others write; it must be opened again")
    return Session(
        session_id, int(bucket_id), int(sequence), _blob(chain), _blob(result), int(direct),
        _blob(direct_result) if direct_result is not None else b"",
        tuple(other for other, _ in others),
    )  # fmt: skip


def holds_lease(tx: Transaction, session_id: SessionID) -> bool:
    """Whether the session holds its bucket's write lease."""
    return bool(tx.number("SELECT holds_lease FROM session WHERE session_id=?", (session_id,)))


def is_alone(tx: Transaction, session_id: SessionID, now_s: int) -> bool:
    """Whether no other session is active on the session's bucket."""
    return not tx.number(
        "SELECT count(*) FROM session AS own JOIN session AS other"
        " ON other.bucket_id=own.bucket_id AND other.session_id<>own.session_id"
        " WHERE own.session_id=? AND other.expires_s>?",
        (session_id, now_s),
    )


def release_lease(tx: Transaction, session_id: SessionID) -> None:
    """The holder gives its lease back."""
    tx.execute("UPDATE session SET holds_lease=0 WHERE session_id=?", (session_id,))


def reserve(tx: Transaction, session: Session, reserved: Sequence[Reservation]) -> None:
    """Keep files for the content that a session, which gives its lease back, has staged."""
    tx.execute("DELETE FROM reservation WHERE session_id=?", (session.session_id,))
    for item in reserved:
        key = (session.bucket_id, item.inode)
        tx.execute("DELETE FROM reservation WHERE bucket_id=? AND inode=?", key)
        tx.execute(
            "INSERT INTO reservation VALUES (?,?,?,?)", (*key, session.session_id, item.commits)
        )


def use_reservation(tx: Transaction, session: Session, inode: int, now_s: int) -> None:
    """Before a content commit: count it if it was reserved; raises Reserved for another's."""
    row = tx.one(
        "SELECT reservation.session_id, expires_s FROM reservation"
        " JOIN session ON session.session_id=reservation.session_id"
        " WHERE reservation.bucket_id=? AND inode=?",
        (session.bucket_id, inode),
    )
    if row is None:
        return
    if row[0] != session.session_id and int(row[1]) > now_s:
        raise Reserved(f"inode {inode} waits for content that another session has staged")
    tx.execute(
        "UPDATE reservation SET commits=commits-1 WHERE bucket_id=? AND inode=?",
        (session.bucket_id, inode),
    )
    tx.execute("DELETE FROM reservation WHERE bucket_id=? AND commits<=0", (session.bucket_id,))


def take_leases(tx: Transaction, bucket_id: int, cache_id: bytes) -> None:
    """End every other session's lease: it was given back, recalled in vain, or has expired."""
    tx.execute(
        "UPDATE session SET holds_lease=0 WHERE bucket_id=? AND cache_id<>?",
        (bucket_id, cache_id),
    )


def acquire_lease(
    tx: Transaction, session: Session, open_orphans: Sequence[int], now_s: int
) -> bool:
    """Give the lease to a session that is alone, and drop inodes nobody can reach any more."""
    if session.others:
        return False
    renew(tx, session.session_id, now_s)
    tx.execute("UPDATE session SET holds_lease=0 WHERE bucket_id=?", (session.bucket_id,))
    tx.execute("UPDATE session SET holds_lease=1 WHERE session_id=?", (session.session_id,))
    inodes.reap_all(tx, session.bucket_id, frozenset(open_orphans))
    return True


def renew(tx: Transaction, session_id: SessionID, now_s: int) -> None:
    """Extend a session by its life."""
    tx.execute(
        "UPDATE session SET expires_s=? WHERE session_id=?",
        (now_s + int(SESSION_LIFE_S), session_id),
    )


def close(tx: Transaction, session: Session) -> None:
    """End a session for good: its client has nothing left to send."""
    if not session.others:
        inodes.reap_all(tx, session.bucket_id)
    tx.execute("DELETE FROM reservation WHERE session_id=?", (session.session_id,))
    tx.execute("DELETE FROM session WHERE session_id=?", (session.session_id,))


def record_batch(tx: Transaction, session: Session, request: ApplyRequest, result: bytes) -> None:
    """Keep the batch just applied, in its own transaction."""
    if request.direct:
        tx.execute(
            "UPDATE session SET direct_sequence=?, direct_result=? WHERE session_id=?",
            (request.sequence, result, session.session_id),
        )
    else:
        tx.execute(
            "UPDATE session SET last_sequence=?, last_chain=?, last_result=? WHERE session_id=?",
            (request.sequence, request.chain, result, session.session_id),
        )
    tx.execute(
        "UPDATE bucket SET transactions=transactions+1 WHERE bucket_id=?", (session.bucket_id,)
    )

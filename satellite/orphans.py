"""Drop inodes that lost their last name while several sessions were active.

A session that works alone says itself when a file without names is closed. While others may have
it open nobody can: the satellite asks all of them, again and again, and drops what none holds.
"""

import logging
import sqlite3
from dataclasses import dataclass
from functools import partial

import trio

from network.errors import DcsError
from network.ids import SessionID
from network.limits import ORPHAN_INTERVAL_S, ORPHANS_ASKED_MAX
from network.runtime import Runtime, now_s
from satellite.db.database import Database, Transaction
from satellite.hub import Hub
from satellite.metabase import inodes, sessions

log = logging.getLogger(__name__)

BUCKETS_AT_ONCE = 16
"""A session that does not answer holds its own bucket up, not the others."""


@dataclass(frozen=True, slots=True)
class SharedOrphans:
    """Who is active on a bucket, if nobody holds its lease, and inodes without names."""

    bucket_id: int
    sessions: tuple[SessionID, ...]
    inodes: tuple[int, ...]


def buckets_with_orphans(tx: Transaction) -> list[int]:
    """Buckets in which an inode has no names."""
    return [int(row[0]) for row in tx.all("SELECT DISTINCT bucket_id FROM inode WHERE nlink=0")]


def page(tx: Transaction, bucket_id: int, after: int, now: int) -> SharedOrphans:
    """The next ORPHANS_ASKED_MAX orphans of a bucket; no sessions if one holds the lease."""
    rows = tx.all(
        "SELECT inode FROM inode WHERE bucket_id=? AND inode>? AND nlink=0 ORDER BY inode LIMIT ?",
        (bucket_id, after, ORPHANS_ASKED_MAX),
    )
    active = sessions.active_without_lease(tx, bucket_id, now)
    return SharedOrphans(bucket_id, active, tuple(int(row[0]) for row in rows))


def drop(tx: Transaction, orphans: SharedOrphans, held: frozenset[int], now: int) -> int:
    """Drop those that are not held, unless other sessions are active now; returns how many."""
    if sessions.active_without_lease(tx, orphans.bucket_id, now) != orphans.sessions:
        return 0
    dropped = [inode for inode in orphans.inodes if inode not in held]
    for inode in dropped:
        inodes.reap(tx, orphans.bucket_id, inode)
    return len(dropped)


async def collect_forever(database: Database, hub: Hub, runtime: Runtime) -> None:
    """The satellite's background task; until cancelled. A page is dropped whole or not at all.

    What fails, the database too, is tried again at the next turn.
    """
    limiter = trio.CapacityLimiter(BUCKETS_AT_ONCE)

    async def collect(bucket_id: int) -> None:
        async with limiter:
            try:
                await _collect(database, hub, runtime, bucket_id)
            except (DcsError, sqlite3.Error) as error:
                log.warning("inodes without names stay for now: %s", error)

    while True:
        await trio.sleep(ORPHAN_INTERVAL_S)
        try:
            found = database.read(buckets_with_orphans)
        except sqlite3.Error as error:
            log.warning("the database cannot be read: %s", error)
            continue
        async with trio.open_nursery() as nursery:
            for bucket_id in found:
                nursery.start_soon(collect, bucket_id)


async def _collect(database: Database, hub: Hub, runtime: Runtime, bucket_id: int) -> None:
    """Drop what nobody holds in one bucket; stops where a session does not answer."""
    after = 0
    while True:
        read = partial(page, bucket_id=bucket_id, after=after, now=now_s(runtime))
        orphans = database.read(read)
        if not orphans.inodes or not orphans.sessions:
            return
        held = await hub.held_by(orphans.sessions, orphans.inodes)
        if held is None:
            return
        write = partial(drop, orphans=orphans, held=held, now=now_s(runtime))
        count = await database.write(write)
        log.debug("bucket %d: %d inodes without names were dropped", bucket_id, count)
        after = orphans.inodes[-1]

"""One SQLite file in WAL mode: reads inline on the loop, writes through one committer.

Concurrent writers share a transaction (group commit with synchronous=FULL): each runs in a
savepoint of its own, so one failure does not undo its neighbours, and each is answered after the
commit. SQL stays in the subset that PostgreSQL shares (`?` is the only dialect mark).
"""

import re
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Generic, TypeVar

import trio

from network.errors import Internal, InvalidArgument
from network.runtime import Runtime

T = TypeVar("T")
Value = int | str | bytes | None
DbRow = tuple[int | str | bytes, ...]

GROUP_WRITES_MAX = 64
QUEUED_WRITES_MAX = 1024


class Transaction:
    """What reads and writes are given: statements on a connection."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def execute(self, sql: str, parameters: Sequence[Value] = ()) -> int:
        """Run a statement; returns the number of rows it changed."""
        return self._connection.execute(sql, parameters).rowcount

    def execute_many(self, sql: str, rows: Sequence[Sequence[Value]]) -> None:
        """Run a statement once per row."""
        self._connection.executemany(sql, rows)

    def one(self, sql: str, parameters: Sequence[Value] = ()) -> DbRow | None:
        """The first row, or None."""
        row: DbRow | None = self._connection.execute(sql, parameters).fetchone()
        return row

    def all(self, sql: str, parameters: Sequence[Value] = ()) -> list[DbRow]:
        """All rows; callers bound the query."""
        return self._connection.execute(sql, parameters).fetchall()

    def number(self, sql: str, parameters: Sequence[Value] = ()) -> int:
        """The single integer a query returns; 0 for NULL or no row."""
        row = self.one(sql, parameters)
        return int(row[0]) if row and row[0] is not None else 0


@dataclass(slots=True)
class _Write(Generic[T]):
    function: Callable[[Transaction], T]
    done: trio.Event
    result: T | None = None
    error: Exception | None = None


class Database:
    """Open with `Database(path)`, run `commit_forever` in a nursery, `close` at the end."""

    def __init__(self, path: Path, runtime: Runtime) -> None:
        self._runtime = runtime
        self._writer = self._open(path)
        self._writer.execute("PRAGMA synchronous=FULL")
        migrate(self._writer)
        self._reader = self._open(path)
        self._reader.execute("PRAGMA query_only=1")
        self._queue: list[_Write[object]] = []
        self._wake = trio.Event()
        self._busy = False

    @staticmethod
    def _open(path: Path) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA foreign_keys=1")
        except sqlite3.Error as error:
            raise InvalidArgument(f"database {path} cannot be opened: {error}") from error
        return connection

    def read(self, function: Callable[[Transaction], T]) -> T:
        """Run a short read on one snapshot of the committed state, inline."""
        self._reader.execute("BEGIN")
        try:
            return function(Transaction(self._reader))
        finally:
            self._reader.execute("COMMIT")

    async def write(self, function: Callable[[Transaction], T]) -> T:
        """Run `function` in a transaction; returns after it is durable.

        Raises what the function raised, its changes undone. If cancelled, the write still
        happens.
        """
        if len(self._queue) >= QUEUED_WRITES_MAX:
            raise Internal("the satellite is overloaded; try again")
        item = _Write(function, trio.Event())
        self._queue.append(item)  # type: ignore[arg-type]  # the queue holds writes of any result
        self._wake.set()
        await item.done.wait()
        if item.error is not None:
            raise item.error
        return item.result  # type: ignore[return-value]  # set whenever error is None

    async def commit_forever(self) -> None:
        """The committer: groups waiting writes into transactions until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._queue:
                group = self._queue[:GROUP_WRITES_MAX]
                del self._queue[:GROUP_WRITES_MAX]
                with trio.CancelScope(shield=True):
                    await self._runtime.offload(self._commit, group)
                for item in group:
                    item.done.set()

    def _commit(self, group: list[_Write[object]]) -> None:
        connection = self._writer
        try:
            connection.execute("BEGIN IMMEDIATE")
            for item in group:
                connection.execute("SAVEPOINT item")
                try:
                    item.result = item.function(Transaction(connection))
                except Exception as error:  # noqa: BLE001 -- handed to the task that asked
                    connection.execute("ROLLBACK TO item")
                    item.error = error
                connection.execute("RELEASE item")
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            for item in group:
                item.error = Internal(f"the satellite's database failed: {error}")

    def close(self) -> None:
        """Checkpoint and close."""
        self._reader.close()
        self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._writer.close()


def migrate(connection: sqlite3.Connection) -> int:
    """Bring the schema to the newest version; returns it. Raises InvalidArgument for a later one.

    Each migration is one transaction with its number, so a crash between two is harmless.
    """
    connection.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER PRIMARY KEY)")
    have = connection.execute("SELECT max(version) FROM schema_version").fetchone()[0] or 0
    scripts = sorted(
        (int(match[1]), entry)
        for entry in resources.files("satellite.db").joinpath("migrations").iterdir()
        if (match := re.match(r"(\d{4})_\w+\.sql$", entry.name))
    )
    newest = scripts[-1][0]
    if have > newest:
        raise InvalidArgument(
            f"the database has schema {have}, this program knows {newest}: upgrade the program"
        )
    for version, script in scripts:
        if version > have:
            connection.executescript(
                f"BEGIN; {script.read_text()};"
                f"INSERT INTO schema_version VALUES ({version}); COMMIT;"
            )
    return newest

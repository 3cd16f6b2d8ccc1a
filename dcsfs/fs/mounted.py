"""Put a file system together: cache directory, session, log, recovery, background tasks."""

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from dcsfs import keys
from dcsfs.access import AccessGrant
from dcsfs.cache import identity
from dcsfs.cache.clean import CleanCache
from dcsfs.cache.log import WriteLog
from dcsfs.fs.coherence import Coherence
from dcsfs.fs.direct import DirectCalls
from dcsfs.fs.filesystem import FileSystem
from dcsfs.fs.reader import Reader
from dcsfs.fs.volume import SessionState, Volume, open_session
from dcsfs.fs.writeback import Writeback
from dcsfs.uplink.client import BucketClient, open_bucket
from network import messages as m
from network.errors import DcsError, InvalidArgument, SessionLost, Unavailable
from network.files import DirectoryLock
from network.limits import SESSION_RENEW_S, STAGE_INTERVAL_S
from network.rpc import ConnectionPool
from network.runtime import Runtime
from network.units import GiB, MiB

log = logging.getLogger(__name__)

SESSION_RETRY_S = 2.0
CACHE_BYTES_MIN = 256 * MiB
CACHE_BYTES_DEFAULT = 10 * GiB


@dataclass(frozen=True, slots=True)
class VolumeOptions:
    """How a volume is opened."""

    cache_dir: Path
    cache_bytes: int = CACHE_BYTES_DEFAULT
    read_only: bool = False
    sync_to_network: bool = False
    is_exclusive: bool = False
    """No other session may write to the bucket."""
    is_temporary: bool = False
    """The cache directory is thrown away at the end: nothing in it need survive a crash."""

    def __post_init__(self) -> None:
        if self.cache_bytes < CACHE_BYTES_MIN:
            raise InvalidArgument("cache_size must be at least 256MiB")


@dataclass(slots=True)
class Mounted:
    """A running file system and its parts, for mount, status and tests."""

    filesystem: FileSystem
    volume: Volume
    client: BucketClient
    reader: Reader
    writeback: Writeback | None
    coherence: Coherence | None
    replayed: int

    async def drain(self) -> None:
        """Commit everything to the network."""
        await self.filesystem.sync_everything()


@asynccontextmanager
async def open_volume(
    runtime: Runtime, pool: ConnectionPool, grant: AccessGrant, bucket: str, options: VolumeOptions
) -> AsyncIterator[Mounted]:
    """Open a bucket as a file system with its background tasks; closes locally on exit.

    Leaving does not flush: call `drain` first. What is not flushed stays in the log for the next
    mount. Raises NotFound, WrongPassphrase, BucketBusy, InvalidArgument, Unavailable.
    """
    client = await open_bucket(runtime, pool, grant, bucket)
    directory = options.cache_dir
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise InvalidArgument(f"cache directory {directory}: {error.strerror}") from error
    lock = DirectoryLock(directory, "cache directory")
    try:
        own = identity.claim(directory, client.bucket_id, client.info.wrapped_root_key, runtime)
        cache_id = own.cache_id
        log_share = options.cache_bytes * 3 // 4
        clean = CleanCache(directory / "clean", options.cache_bytes - log_share, runtime)
        try:
            write_log, session = None, None
            if not options.read_only:
                session = await _open_session(client, cache_id, options)
                log_key = keys.derive(client.root_key, b"log " + cache_id)
                write_log = WriteLog(
                    directory / "log", log_key, runtime, is_durable=not options.is_temporary
                )
            volume = Volume(
                client, runtime, clean, write_log, session, keeps_clean=not options.is_temporary
            )
            replayed = 0 if options.read_only else await volume.recover()
            failure: Exception | None = None
            try:
                async with trio.open_nursery() as nursery:
                    mounted = _assemble(volume, nursery, options, log_share, replayed, cache_id)
                    await mounted.filesystem.start()
                    try:
                        yield mounted
                    except Exception as error:
                        failure = error
                        raise
                    nursery.cancel_scope.cancel()
            except BaseExceptionGroup as group:
                if failure is not None and group.exceptions == (failure,):
                    raise failure from None  # the caller's own error, as it was raised
                raise
            finally:
                if write_log is not None:
                    write_log.close()
        finally:
            clean.close()
    finally:
        lock.release()


async def _open_session(
    client: BucketClient, cache_id: bytes, options: VolumeOptions
) -> SessionState:
    return await open_session(client, cache_id, os.getpid(), is_exclusive=options.is_exclusive)


def _assemble(
    volume: Volume,
    nursery: trio.Nursery,
    options: VolumeOptions,
    log_share: int,
    replayed: int,
    cache_id: bytes,
) -> Mounted:
    """The services over a volume, their tasks in `nursery`."""
    reader = Reader(volume, nursery)
    writeback: Writeback | None = None
    direct: DirectCalls | None = None
    coherence: Coherence | None = None
    if not options.read_only:
        writeback = Writeback(volume, reader)
        direct = DirectCalls(volume, writeback.next_progress)
        reopen = partial(_open_session, volume.client, cache_id, options)
        coherence = Coherence(volume, writeback, direct, reopen)
        nursery.start_soon(writeback.run)
        nursery.start_soon(direct.run)
        nursery.start_soon(coherence.run)
        if not options.is_temporary:
            nursery.start_soon(_sync_forever, volume)
        nursery.start_soon(_renew_forever, volume)
    filesystem = FileSystem(
        volume,
        reader,
        writeback,
        direct,
        log_bytes_max=log_share,
        sync_to_network=options.sync_to_network,
    )
    return Mounted(filesystem, volume, volume.client, reader, writeback, coherence, replayed)


async def _sync_forever(volume: Volume) -> None:
    """Bound what an unsynced write can lose to the stage interval."""
    while True:
        await trio.sleep(STAGE_INTERVAL_S)
        try:
            await volume.log.sync()
        except OSError as error:
            log.error("cache disk failed, writes are refused from now on: %s", error)
            return


async def _renew_forever(volume: Volume) -> None:
    pause = SESSION_RENEW_S
    while True:
        await trio.sleep(pause)
        pause = SESSION_RENEW_S
        request = m.SessionRequest(volume.client.api_key, volume.session.session_id)
        try:
            await volume.client.call(m.RENEW_SESSION, request)
        except SessionLost as error:
            log.warning("%s", error)
            volume.on_session_lost()
        except DcsError as error:
            log.info("session not renewed: %s", error)
            pause = SESSION_RETRY_S


async def close_session(mounted: Mounted) -> None:
    """Give the bucket free for other writers; only when nothing is left to flush."""
    volume = mounted.volume
    if volume.is_read_only:
        return
    if mounted.coherence is not None:
        mounted.coherence.close()
    request = m.SessionRequest(volume.client.api_key, volume.session.session_id)
    # The satellite forgets the session: from here on only DONE records say what it has.
    await volume.log.sync()
    try:
        await volume.client.call(m.CLOSE_SESSION, request)
        volume.log.discard()
    except (Unavailable, SessionLost) as error:
        log.info("session not closed, it expires by itself: %s", error)

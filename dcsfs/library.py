"""The uplink library: projects, buckets, files by path, without a mount.

A bucket is opened as a volume with a private cache directory, so the library has the mount's
semantics and its guarantees: a write is committed when `sync` (or the end of the block) returns.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from dcsfs.access import AccessGrant
from dcsfs.fs.building import Caller, Changes
from dcsfs.fs.errors import FsError
from dcsfs.fs.mounted import Mounted, VolumeOptions, close_session, open_volume
from dcsfs.fs.state import Inode
from dcsfs.uplink import buckets
from network.errors import (
    InvalidArgument,
    IsADirectory,
    NotADirectory,
    NotFound,
    QuotaExceeded,
    Unavailable,
)
from network.messages import Kind
from network.rpc import ConnectionPool
from network.runtime import Runtime, SystemRuntime
from network.units import GiB, MiB

READ_BYTES = 1 * MiB


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file, directory or link of a bucket."""

    path: str
    kind: Kind
    size: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    nlink: int
    inode: int


class Bucket:
    """An open bucket; made by `Project.open_bucket`."""

    def __init__(self, mounted: Mounted) -> None:
        self.mounted = mounted
        self._fs = mounted.filesystem
        self._caller = Caller(os.getuid(), os.getgid(), 0)

    async def _walk(self, path: str) -> Inode:
        inode = self._fs.root
        for part in _parts(path):
            try:
                inode = await self._fs.directories.lookup(inode.number, os.fsencode(part))
            except FsError as error:
                raise NotFound(f"{path!r} does not exist") from error
        return inode

    async def stat(self, path: str) -> FileInfo:
        """Attributes of a path; raises NotFound."""
        return _info(path, await self._walk(path))

    async def list_directory(self, path: str) -> list[FileInfo]:
        """Entries of a directory, sorted by name; raises NotFound, NotADirectory."""
        inode = await self._walk(path)
        if not inode.is_directory:
            raise NotADirectory(f"{path!r} is not a directory")
        prefix = path.strip("/") + "/" if path.strip("/") else ""
        found = [
            _info(prefix + os.fsdecode(entry.name), self._fs.inode(entry.child))
            for entry in await self._fs.directories.read(inode.number)
        ]
        return sorted(found, key=lambda item: item.path)

    async def make_directory(self, path: str, *, parents: bool = True, mode: int = 0o755) -> Inode:
        """Make a directory; one that exists is left as it is. Missing parents get 0755."""
        inode = self._fs.root
        parts = _parts(path)
        for number, part in enumerate(parts):
            name = os.fsencode(part)
            try:
                inode = await self._fs.directories.lookup(inode.number, name)
            except FsError as error:
                if number + 1 < len(parts) and not parents:
                    raise NotFound(f"{path!r}: a parent does not exist") from error
                inode = await self._fs.create_node(
                    inode.number, name, Kind.DIRECTORY,
                    mode if number + 1 == len(parts) else 0o755, self._caller,
                )  # fmt: skip
            if not inode.is_directory:
                raise NotADirectory(f"{path!r}: {part!r} is not a directory")
        return inode

    async def make_symlink(self, path: str, target: str) -> None:
        """Make a symbolic link, replacing a file or link; raises IsADirectory. Parents are made."""
        parts = _parts(path)
        if not parts:
            raise InvalidArgument("a link needs a name")
        parent = await self.make_directory("/".join(parts[:-1]))
        aside = _aside()
        await self._fs.create_node(
            parent.number, aside, Kind.SYMLINK, 0o777, self._caller, target=os.fsencode(target)
        )
        await self._put_in_place(parent, aside, path)

    async def read_symlink(self, path: str) -> str:
        """A symbolic link's target; raises NotFound, InvalidArgument."""
        inode = await self._walk(path)
        if inode.kind is not Kind.SYMLINK:
            raise InvalidArgument(f"{path!r} is not a symbolic link")
        return os.fsdecode(inode.symlink)

    async def _put_in_place(self, parent: Inode, aside: bytes, path: str) -> None:
        name = os.fsencode(_parts(path)[-1])
        try:
            await self._fs.rename(parent.number, aside, parent.number, name, 0)
        except FsError as error:
            await self._fs.unlink(parent.number, aside)
            raise IsADirectory(f"{path!r} is a directory") from error

    async def write_file(
        self,
        path: str,
        data: bytes | AsyncIterable[bytes],
        *,
        mode: int = 0o644,
        mtime_ns: int | None = None,
    ) -> int:
        """Write a whole file, replacing what is there; returns its size in bytes.

        Parents are made. The new content appears under the name only when it is complete: it is
        written beside it and renamed. Committed by the next `sync`. Raises QuotaExceeded, and
        Unavailable when there is no room on the local disk.
        """
        parts = _parts(path)
        if not parts:
            raise InvalidArgument("a file needs a name")
        parent = await self.make_directory("/".join(parts[:-1]))
        aside = _aside()
        handle, inode = await self._fs.create(
            parent.number, aside, mode, os.O_WRONLY | os.O_EXCL, self._caller
        )
        try:
            size = 0
            async with aclosing(_pieces(data)) as pieces:
                async for part in pieces:
                    size += await self._fs.write(handle, size, part)
        except BaseException as error:
            with trio.CancelScope(shield=True), trio.move_on_after(5):
                await self._fs.unlink(parent.number, aside)
            if isinstance(error, FsError):
                kind = QuotaExceeded if error.errno == errno.EDQUOT else Unavailable
                raise kind(f"{path!r} was not written: {error}") from error
            raise
        finally:
            self._fs.release(handle)
        if mtime_ns is not None:
            await self._fs.set_attributes(inode.number, Changes(mtime_ns=mtime_ns))
        await self._put_in_place(parent, aside, path)
        return size

    async def read_file(
        self, path: str, offset: int = 0, length: int | None = None
    ) -> AsyncIterator[bytes | memoryview]:
        """Yield a file's bytes from `offset` on, at most `length`; raises NotFound."""
        inode = await self._walk(path)
        if inode.is_directory:
            raise IsADirectory(f"{path!r} is a directory")
        end = inode.size if length is None else min(inode.size, offset + length)
        handle = await self._fs.open(inode.number, os.O_RDONLY)
        try:
            while offset < end:
                part = await self._fs.read(handle, offset, min(READ_BYTES, end - offset))
                if not part:
                    return
                yield part
                offset += len(part)
        finally:
            self._fs.release(handle)

    async def remove(self, path: str) -> None:
        """Remove a file or an empty directory; raises NotFound, NotEmpty."""
        inode = await self._walk(path)
        parts = _parts(path)
        if not parts:
            raise InvalidArgument("the root cannot be removed")
        parent = await self._walk("/".join(parts[:-1]))
        if inode.is_directory:
            await self._fs.rmdir(parent.number, os.fsencode(parts[-1]))
        else:
            await self._fs.unlink(parent.number, os.fsencode(parts[-1]))

    async def sync(self) -> None:
        """Return once everything written is committed at the satellite.

        Raises QuotaExceeded, PermissionDenied, Unauthenticated when it will not be.
        """
        await self.mounted.filesystem.sync_everything(or_refusal=True)


class Project:
    """Buckets under one grant; made by `open_project`."""

    def __init__(self, runtime: Runtime, pool: ConnectionPool, access: AccessGrant) -> None:
        self._runtime = runtime
        self._pool = pool
        self._access = access

    async def create_bucket(self, name: str) -> None:
        """Make a bucket; raises AlreadyExists, InvalidArgument, WrongPassphrase."""
        await buckets.create_bucket(
            self._runtime, self._pool, self._access, name, os.getuid(), os.getgid()
        )

    async def list_buckets(self) -> list[str]:
        """Names of all buckets the grant may see."""
        return [info.name for info in await buckets.list_buckets(self._pool, self._access)]

    async def delete_bucket(self, name: str) -> None:
        """Remove an empty bucket; raises NotEmpty, NotFound."""
        await buckets.delete_bucket(self._pool, self._access, name)

    @asynccontextmanager
    async def open_bucket(
        self, name: str, *, read_only: bool = False, cache_dir: Path | None = None
    ) -> AsyncIterator[Bucket]:
        """Open a bucket; a clean end of the block commits what was written.

        If the block ends with an exception, what was not committed yet is dropped, unless
        `cache_dir` was given: then it stays in the log there for the next time.

        Without `cache_dir` a temporary one is used and removed at the end. Raises NotFound,
        WrongPassphrase, BucketBusy (another writer), Unavailable.
        """
        temporary = None
        if cache_dir is None:
            temporary = Path(tempfile.mkdtemp(prefix="dcsfs-", dir="/var/tmp"))
        options = VolumeOptions(
            cache_dir or temporary or Path(),
            4 * GiB,
            read_only=read_only,
            is_temporary=temporary is not None,
        )
        try:
            async with open_volume(
                self._runtime, self._pool, self._access, name, options
            ) as mounted:
                bucket = Bucket(mounted)
                try:
                    yield bucket
                    if not read_only:
                        await bucket.sync()
                        await close_session(mounted)
                except BaseException:
                    if temporary is not None:  # its log goes too: nothing can be resumed
                        with trio.move_on_after(5, shield=True):
                            await close_session(mounted)
                    raise
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)


@asynccontextmanager
async def open_project(
    access: AccessGrant, *, runtime: Runtime | None = None
) -> AsyncIterator[Project]:
    """Open a project; connections are made when needed and closed at the end."""
    runtime = runtime or SystemRuntime()
    pool = ConnectionPool(runtime)
    try:
        yield Project(runtime, pool, access)
    finally:
        pool.close()


def _aside() -> bytes:
    """A name to write under until the content is complete."""
    return b".dcsfs-upload-" + os.urandom(8).hex().encode()


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def _info(path: str, inode: Inode) -> FileInfo:
    return FileInfo(
        path, inode.kind, inode.size, inode.mode, inode.uid, inode.gid, inode.mtime_ns,
        inode.nlink, inode.number,
    )  # fmt: skip


async def _pieces(data: bytes | AsyncIterable[bytes]) -> AsyncGenerator[memoryview, None]:
    if isinstance(data, bytes):
        view = memoryview(data)
        for start in range(0, len(view), READ_BYTES):
            yield view[start : start + READ_BYTES]
        return
    async for part in data:
        view = memoryview(part)
        for start in range(0, len(view), READ_BYTES):
            yield view[start : start + READ_BYTES]

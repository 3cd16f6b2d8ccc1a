"""`dcsfs ls | cp | rm | cat`: files by address, without a mount."""

import datetime
import json
import os
import stat
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import trio
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from dcsfs.cli.common import access_option, echo_rows, json_option, load_grant, parse_address
from dcsfs.library import READ_BYTES, Bucket, FileInfo, open_project
from network.errors import InvalidArgument
from network.messages import Kind


def _time(mtime_ns: int) -> str:
    return datetime.datetime.fromtimestamp(mtime_ns / 1e9, datetime.UTC).strftime(
        "%Y-%m-%d %H:%M:%S"
    )


@click.command()
@access_option
@json_option
@click.argument("address", required=False, metavar="[dcs://BUCKET[/PATH]]")
def ls(access: Path | None, as_json: bool, address: str | None) -> None:
    """List buckets, or a directory."""
    grant = load_grant(access)

    async def run() -> list[FileInfo] | list[str]:
        async with open_project(grant) as project:
            if address is None:
                return await project.list_buckets()
            bucket_name, path = parse_address(address)
            async with project.open_bucket(bucket_name, read_only=True) as bucket:
                info = await bucket.stat(path)
                if info.kind is not Kind.DIRECTORY:
                    return [info]
                return await bucket.list_directory(path)

    found = trio.run(run)
    if as_json:
        rows = [asdict(item) if isinstance(item, FileInfo) else item for item in found]
        click.echo(json.dumps(rows, indent=2))
        return
    table: list[list[object]] = []
    for item in found:
        if isinstance(item, str):
            table.append([f"dcs://{item}"])
        else:
            mark = "/" if item.kind is Kind.DIRECTORY else ""
            table.append([item.size, _time(item.mtime_ns), item.path + mark])
    echo_rows(table)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        disable=not sys.stderr.isatty(), transient=True,
        console=Console(stderr=True),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Job:
    """Something local to copy, and its path in the bucket."""

    local: Path
    path: str
    info: os.stat_result


def _local_tree(source: Path, target: str) -> Iterator[_Job]:
    """Everything below a directory, parents first; symbolic links as they are."""
    for folder, directories, names in os.walk(source):
        for local in (Path(folder), *(Path(folder) / name for name in sorted(names))):
            yield _Job(local, _join(target, local.relative_to(source)), local.lstat())
        for name in directories:
            link = Path(folder) / name
            if link.is_symlink():
                yield _Job(link, _join(target, link.relative_to(source)), link.lstat())


def _join(target: str, relative: Path) -> str:
    return "/".join(part for part in (target.rstrip("/"), *relative.parts) if part)


async def _file_parts(path: Path) -> AsyncIterator[bytes]:
    async with await trio.open_file(path, "rb") as handle:
        while part := await handle.read(READ_BYTES):
            yield part


async def _stdin_parts() -> AsyncIterator[bytes]:
    while part := await trio.to_thread.run_sync(sys.stdin.buffer.read, READ_BYTES):
        yield part


def _parse_range(text: str | None) -> tuple[int, int | None]:
    """(offset, length) of `FROM-TO`, both inclusive, or `FROM-`; raises InvalidArgument."""
    if text is None:
        return 0, None
    first, dash, last = text.partition("-")
    if not dash or not first.isdigit() or (last and not last.isdigit()):
        raise InvalidArgument(f"a range must look like 0-1023 or 1024-, not {text!r}")
    if not last:
        return int(first), None
    if int(last) < int(first):
        raise InvalidArgument(f"range {text!r} ends before it begins")
    return int(first), int(last) - int(first) + 1


@click.command()
@access_option
@click.option("-r", "--recursive", is_flag=True, help="Copy a whole directory.")
@click.option("--range", "byte_range", help="FROM-TO: only these bytes of a download.")
@click.argument("source")
@click.argument("target")
def cp(
    access: Path | None, recursive: bool, byte_range: str | None, source: str, target: str
) -> None:
    """Copy between local files and dcs:// addresses; `-` is stdin or stdout."""
    grant = load_grant(access)
    upload = target.startswith("dcs://")
    if upload == source.startswith("dcs://"):
        raise InvalidArgument("one side of a copy must be a dcs:// address, the other local")
    bucket_name, path = parse_address(target if upload else source)
    offset, length = _parse_range(byte_range)
    if byte_range and (upload or recursive):
        raise InvalidArgument("--range is for the download of one file")

    async def run() -> None:
        async with open_project(grant) as project:
            async with project.open_bucket(bucket_name, read_only=not upload) as bucket:
                if upload:
                    await _upload(bucket, source, path, recursive)
                elif recursive:
                    await _download_tree(bucket, path, Path(target))
                else:
                    await _download(bucket, path, target, offset, length)

    trio.run(run)


async def _upload(bucket: Bucket, source: str, path: str, recursive: bool) -> None:
    if source == "-":
        await bucket.write_file(path, _stdin_parts())
        return
    local = Path(source)
    if recursive:
        if not local.is_dir():
            raise InvalidArgument(f"{source} is not a directory")
        jobs = list(_local_tree(local, path))
    else:
        if not local.is_file():
            raise InvalidArgument(f"{source} is not a file (for a directory, give -r)")
        if not path or path.endswith("/"):
            path += local.name
        jobs = [_Job(local, path, local.stat())]
    with _progress() as progress:
        total = sum(job.info.st_size for job in jobs if stat.S_ISREG(job.info.st_mode))
        task = progress.add_task("staging", total=total)
        for job in jobs:
            progress.advance(task, await _upload_one(bucket, job))
        progress.update(task, description="sending", total=None)
        await bucket.sync()


async def _upload_one(bucket: Bucket, job: _Job) -> int:
    """Copy a file, link or directory; returns the content bytes staged."""
    kind, mode = stat.S_IFMT(job.info.st_mode), job.info.st_mode & 0o777
    if kind == stat.S_IFDIR:
        await bucket.make_directory(job.path, mode=mode)
    elif kind == stat.S_IFLNK:
        await bucket.make_symlink(job.path, os.readlink(job.local))
    elif kind == stat.S_IFREG:
        return await bucket.write_file(
            job.path, _file_parts(job.local), mode=mode, mtime_ns=job.info.st_mtime_ns
        )
    else:
        click.echo(f"left out, not a file, link or directory: {job.local}", err=True)
    return 0


async def _download(
    bucket: Bucket, path: str, target: str, offset: int, length: int | None
) -> None:
    if target == "-":
        async for part in bucket.read_file(path, offset, length):
            sys.stdout.buffer.write(part)
        sys.stdout.buffer.flush()
        return
    local = Path(target)
    if local.is_dir():
        local /= Path(path).name
    info = await bucket.stat(path)
    temporary = local.with_name(f".{local.name}.dcsfs-part")
    try:
        with _progress() as progress, temporary.open("wb") as handle:
            task = progress.add_task(local.name, total=length or info.size)
            async for part in bucket.read_file(path, offset, length):
                handle.write(part)
                progress.advance(task, len(part))
        temporary.replace(local)
    except OSError as error:
        raise InvalidArgument(f"cannot write {local}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    if _is_whole(offset, length):
        local.chmod(info.mode)
        os.utime(local, ns=(info.mtime_ns, info.mtime_ns))


def _is_whole(offset: int, length: int | None) -> bool:
    """Whether a download is of the whole file, so that its mode and time are worth keeping."""
    return offset == 0 and length is None


async def _download_tree(bucket: Bucket, path: str, target: Path) -> None:
    """Copy a directory's content into `target`; a directory made here gets its mode at the end."""
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    for info in await bucket.list_directory(path):
        local = target / Path(info.path).name
        if info.kind is Kind.DIRECTORY:
            await _download_tree(bucket, info.path, local)
        elif info.kind is Kind.FILE:
            await _download(bucket, info.path, str(local), 0, None)
        elif info.kind is Kind.SYMLINK:
            local.unlink(missing_ok=True)
            local.symlink_to(await bucket.read_symlink(info.path))
        else:
            click.echo(f"left out, not a file, link or directory: {info.path}", err=True)
    if is_new:
        target.chmod((await bucket.stat(path)).mode)


@click.command()
@access_option
@click.option("-r", "--recursive", is_flag=True, help="Remove a directory with its content.")
@click.argument("address", metavar="dcs://BUCKET/PATH")
def rm(access: Path | None, recursive: bool, address: str) -> None:
    """Remove a file."""
    grant = load_grant(access)
    bucket_name, path = parse_address(address)

    async def run() -> None:
        async with open_project(grant) as project:
            async with project.open_bucket(bucket_name) as bucket:
                info = await bucket.stat(path)
                if info.kind is Kind.DIRECTORY and not recursive:
                    raise InvalidArgument(f"{path!r} is a directory (give -r)")
                await _remove(bucket, info)

    trio.run(run)


async def _remove(bucket: Bucket, info: FileInfo) -> None:
    if info.kind is Kind.DIRECTORY:
        for entry in await bucket.list_directory(info.path):
            await _remove(bucket, entry)
    if info.path.strip("/"):
        await bucket.remove(info.path)


@click.command()
@access_option
@click.option("--range", "byte_range", help="FROM-TO: only these bytes.")
@click.argument("address", metavar="dcs://BUCKET/PATH")
def cat(access: Path | None, byte_range: str | None, address: str) -> None:
    """Write a file's content to stdout."""
    grant = load_grant(access)
    bucket_name, path = parse_address(address)
    offset, length = _parse_range(byte_range)

    async def run() -> None:
        async with open_project(grant) as project:
            async with project.open_bucket(bucket_name, read_only=True) as bucket:
                await _download(bucket, path, "-", offset, length)

    trio.run(run)

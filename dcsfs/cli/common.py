"""What commands share: grants, addresses, exit codes, the library's client."""

import os
import tomllib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import trio

from dcsfs.access import AccessGrant, load_access
from network.errors import InvalidArgument
from network.rpc import ConnectionPool
from network.runtime import Runtime, SystemRuntime

T = TypeVar("T")

CONFIG_PATH = Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config")) / "dcsfs.toml"
SYSTEM_CONFIG_PATH = Path("/etc/dcsfs.toml")

access_option = click.option(
    "--access",
    "access",
    type=click.Path(path_type=Path),
    help="Access grant file (default: $DCSFS_ACCESS, then the configuration file).",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def find_access(path: Path | None) -> Path:
    """The grant file to use; raises InvalidArgument when none is configured."""
    if path is not None:
        return path
    if "DCSFS_ACCESS" in os.environ:
        return Path(os.environ["DCSFS_ACCESS"])
    for config in (CONFIG_PATH, SYSTEM_CONFIG_PATH):
        if config.exists():
            try:
                values = tomllib.loads(config.read_text())
            except (OSError, tomllib.TOMLDecodeError) as error:
                raise InvalidArgument(f"{config} cannot be used: {error}") from error
            unknown = set(values) - {"access", "cache_dir", "cache_size"}
            if unknown:
                raise InvalidArgument(f"{config} has an unknown key: {min(unknown)}")
            if "access" in values:
                return Path(str(values["access"]))
    raise InvalidArgument(
        'no access grant: give --access FILE, set DCSFS_ACCESS, or write access = "FILE" in '
        f"{CONFIG_PATH}"
    )


def load_grant(path: Path | None) -> AccessGrant:
    """Read the grant to use."""
    return load_access(find_access(path))


def parse_address(text: str) -> tuple[str, str]:
    """(bucket, path) of `dcs://BUCKET/PATH`; raises InvalidArgument."""
    if not text.startswith("dcs://"):
        raise InvalidArgument(f"an address must look like dcs://BUCKET/PATH, not {text!r}")
    bucket, _, path = text[len("dcs://") :].partition("/")
    if not bucket:
        raise InvalidArgument(f"{text!r} names no bucket")
    if "\0" in path or any(part in (".", "..") for part in path.split("/")):
        raise InvalidArgument(f"{text!r}: a path cannot contain '.', '..' or NUL")
    return bucket, path


def run_with_pool(function: Callable[[Runtime, ConnectionPool], Awaitable[T]]) -> T:
    """Run an asynchronous command with a connection pool of its own."""

    async def main() -> T:
        runtime = SystemRuntime()
        pool = ConnectionPool(runtime)
        try:
            return await function(runtime, pool)
        finally:
            pool.close()

    return trio.run(main)


def echo_rows(rows: list[list[Any]]) -> None:
    """Print aligned columns."""
    if not rows:
        return
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        click.echo(
            "  ".join(str(cell).ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        )

"""`dcs-satellite setup | run | status`.

Exit codes: 0 success, 1 refused or failed (a sentence says why), 2 wrong usage.
"""

import base64
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import click
import trio

from network import messages
from network.errors import InvalidArgument
from network.files import DirectoryLock, write_durably
from network.identity import PeerAddress
from network.macaroon import Macaroon
from network.method import Method
from network.process import (
    ErrorGroup,
    configure_logging,
    raise_descriptor_limit,
    until_signalled,
)
from network.rpc import ConnectionPool
from network.runtime import SystemRuntime
from network.units import format_size, parse_size
from satellite import config as satellite_config
from satellite.config import DATABASE_NAME, SatelliteConfig, load_identity
from satellite.db.database import Database, Transaction
from satellite.metabase import buckets
from satellite.peer import Satellite

Req = TypeVar("Req")
Resp = TypeVar("Resp")
DIRECTORY = click.Path(file_okay=False, path_type=Path)
API_KEY_NAME = "api.key"


@click.group(cls=ErrorGroup)
@click.option("-v", "--verbose", is_flag=True, help="Log every lifecycle event.")
def main(verbose: bool) -> None:
    """Run a dcsfs satellite."""
    configure_logging(verbose)


@main.command()
@click.option("--listen", required=True, metavar="HOST:PORT", help="Address to listen on.")
@click.option("--redundancy", default="29/35/80/110", show_default=True)
@click.option("--project", default="default", show_default=True, help="Name of the first project.")
@click.argument("directory", type=DIRECTORY)
def setup(listen: str, redundancy: str, project: str, directory: Path) -> None:
    """Make a satellite directory with one project and its API key (file `api.key`)."""
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdigit():
        raise InvalidArgument(f"a listen address must look like HOST:PORT, not {listen!r}")
    settings = SatelliteConfig(host.strip("[]"), int(port), redundancy)
    identity = satellite_config.setup(directory, settings, os.urandom(64))
    key_path = directory / API_KEY_NAME
    if not key_path.exists():
        trio.run(_make_project, directory, project, key_path)
    click.echo(f"{identity.id}@{host}:{port}")


async def _make_project(directory: Path, name: str, key_path: Path) -> None:
    runtime = SystemRuntime()
    database = Database(directory / DATABASE_NAME, runtime)
    head, secret, salt = (runtime.random_bytes(size) for size in (32, 32, 16))

    def write(tx: Transaction) -> None:
        now = runtime.now_ns()
        project_id = buckets.create_project(tx, name, salt, now)
        buckets.create_key(tx, project_id, head, secret, "setup", now)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(database.commit_forever)
        await database.write(write)
        nursery.cancel_scope.cancel()
    database.close()
    encoded = base64.urlsafe_b64encode(Macaroon.mint(head, secret).encode())
    write_durably(key_path, encoded + b"\n")


@main.command()
@click.argument("directory", type=DIRECTORY)
def run(directory: Path) -> None:
    """Run the satellite until SIGTERM; prints `ready` once it answers."""
    settings, identity = SatelliteConfig.load(directory), load_identity(directory)
    raise_descriptor_limit()
    lock = DirectoryLock(directory, "satellite directory")

    async def serve() -> None:
        runtime = SystemRuntime()
        database = Database(directory / DATABASE_NAME, runtime)
        satellite = Satellite(settings, identity, database, runtime)
        listener = await runtime.listen(settings.listen_host, settings.listen_port)
        click.echo("ready")
        await until_signalled(lambda: satellite.run(listener))
        database.close()

    trio.run(serve)
    lock.release()


def _ask(directory: Path, method: Method[Req, Resp], request: Req) -> Resp:
    """Call the running satellite of a directory with its own identity."""
    settings, identity = SatelliteConfig.load(directory), load_identity(directory)
    address = PeerAddress(identity.id, settings.listen_host, settings.listen_port)

    async def ask() -> Resp:
        pool = ConnectionPool(SystemRuntime(), identity)
        try:
            return await pool.call(address, method, request)
        finally:
            pool.close()

    return trio.run(ask)


@main.command()
@click.option("--project", default="default", show_default=True)
@click.argument("directory", type=DIRECTORY)
@click.argument("bucket")
@click.argument("size")
def quota(project: str, directory: Path, bucket: str, size: str) -> None:
    """Let a bucket hold at most SIZE (10GiB) of content, or any amount with `none`."""
    quota_bytes = 0 if size == "none" else parse_size(size)
    if size != "none" and not quota_bytes:
        raise InvalidArgument("a quota of nothing is not one: say `none` to lift it")
    request = messages.SetQuotaRequest(project, bucket, quota_bytes)
    used = _ask(directory, messages.SET_QUOTA, request).used_bytes
    limit = format_size(quota_bytes) if quota_bytes else "no limit"
    click.echo(f"{bucket}: {format_size(used)} used, {limit}")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("directory", type=DIRECTORY)
def status(directory: Path, as_json: bool) -> None:
    """Ask the running satellite of DIRECTORY for its counts and nodes."""
    answer = _ask(directory, messages.SATELLITE_STATUS, messages.Empty())
    bad = [node for node in answer.nodes if node.bad_shares]
    if as_json:
        values = asdict(answer)
        for node in values["nodes"]:
            node["node_id"] = str(node["node_id"])
        values["bad_nodes"] = [str(node.node_id) for node in bad]
        click.echo(json.dumps(values, indent=2))
        return
    online = sum(node.online for node in answer.nodes)
    click.echo(f"address       {answer.address}")
    click.echo(f"nodes         {online} of {len(answer.nodes)} online")
    click.echo(f"segments      {answer.segments}, {format_size(answer.live_bytes)} live")
    click.echo(f"inodes        {answer.inodes}\ntransactions  {answer.transactions}")
    for node in bad:
        click.echo(f"bad node      {node.node_id} at {node.host}: {node.bad_shares} bad shares")

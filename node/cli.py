"""`dcs-node setup | run | host | status`.

Exit codes: 0 success, 1 refused or failed (a sentence says why), 2 wrong usage.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

import click
import trio

from network import messages
from network.errors import InvalidArgument
from network.files import DirectoryLock
from network.identity import PeerAddress
from network.piecemessages import NODE_STATUS, NodeStatus
from network.process import (
    ErrorGroup,
    configure_logging,
    raise_descriptor_limit,
    until_signalled,
)
from network.rpc import ConnectionPool
from network.runtime import SystemRuntime
from network.units import format_size, parse_size
from node import config as node_config
from node.config import NodeConfig, load_identity
from node.host import Host

DIRECTORY = click.Path(file_okay=False, path_type=Path)


@click.group(cls=ErrorGroup)
@click.option("-v", "--verbose", is_flag=True, help="Log every lifecycle event.")
def main(verbose: bool) -> None:
    """Run a dcsfs storage node."""
    configure_logging(verbose)


def _split_listen(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit():
        raise InvalidArgument(f"a listen address must look like HOST:PORT, not {text!r}")
    return host.strip("[]"), int(port)


@main.command()
@click.option("--satellite", required=True, help="ID@HOST:PORT of the satellite to serve.")
@click.option("--capacity", default="1TiB", show_default=True, help="Space to offer.")
@click.argument("nodes", nargs=-1, required=True, metavar="DIR=HOST:PORT...")
def setup(satellite: str, capacity: str, nodes: tuple[str, ...]) -> None:
    """Make node directories (or change their settings), each with the address it listens on."""
    size = parse_size(capacity)
    for item in nodes:
        directory, equals, listen = item.rpartition("=")
        if not equals or not directory:
            raise InvalidArgument(f"a node must look like DIR=HOST:PORT, not {item!r}")
        host, port = _split_listen(listen)
        settings = NodeConfig(host, port, satellite, size)
        identity = node_config.setup(Path(directory), settings, os.urandom(64))
        click.echo(f"{identity.id}@{host}:{port}")


def _serve(directories: list[Path], control: Path | None) -> None:
    raise_descriptor_limit()
    locks = [DirectoryLock(directory, "node directory") for directory in directories]
    host = Host(directories)

    async def serve() -> None:
        await until_signalled(lambda: host.run(control, lambda: click.echo("ready")))

    trio.run(serve)
    for lock in locks:
        lock.release()


@main.command()
@click.argument("directory", type=DIRECTORY)
def run(directory: Path) -> None:
    """Run one node until SIGTERM; prints `ready` once the satellite knows it."""
    NodeConfig.load(directory)
    _serve([directory], None)


@main.command(hidden=True)
@click.option("--control", type=click.Path(path_type=Path), help="Socket for test commands.")
@click.argument("directories", type=DIRECTORY, nargs=-1, required=True)
def host(directories: tuple[Path, ...], control: Path | None) -> None:
    """Run several nodes in one process (for test networks)."""
    _serve(list(directories), control)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("directory", type=DIRECTORY)
def status(directory: Path, as_json: bool) -> None:
    """Ask the running node of DIRECTORY for its counts."""
    settings, identity = NodeConfig.load(directory), load_identity(directory)
    address = PeerAddress(identity.id, settings.listen_host, settings.listen_port)

    async def ask() -> NodeStatus:
        pool = ConnectionPool(SystemRuntime(), identity)
        try:
            return await pool.call(address, NODE_STATUS, messages.Empty())
        finally:
            pool.close()

    answer = trio.run(ask)
    values = asdict(answer) | {"node_id": str(answer.node_id)}
    if as_json:
        click.echo(json.dumps(values, indent=2))
        return
    click.echo(f"node       {answer.node_id}\naddress    {answer.host}:{answer.port}")
    click.echo(f"stored     {format_size(answer.stored_bytes)} in {answer.pieces} pieces")
    click.echo(f"capacity   {format_size(answer.capacity_bytes)}")
    click.echo(f"orders     {answer.unsettled_orders} unsettled")

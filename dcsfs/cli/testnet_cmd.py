"""`dcsfs testnet`: a whole network on loopback."""

import base64
import json
from pathlib import Path

import click

from dcsfs.cli.access_cmd import make_grant, read_secret
from dcsfs.cli.common import echo_rows, json_option
from dcsfs.testnet.network import Settings, TestNetwork
from network.errors import InvalidArgument
from network.files import write_durably
from network.identity import PeerAddress
from network.units import format_size

directory_option = click.option(
    "--dir", "directory", required=True, type=click.Path(file_okay=False, path_type=Path)
)
node_option = click.option(
    "--node", "nodes", multiple=True, metavar="ID...", help="One or more; repeatable."
)
more_argument = click.argument("more", nargs=-1, metavar="")
"""`--node A B C` leaves B and C as arguments: they are nodes too."""


@click.group()
def testnet() -> None:
    """Run a satellite and storage nodes on this machine, for trying and testing."""


@testnet.command()
@directory_option
@click.option("--nodes", default=110, show_default=True)
@click.option("--redundancy", default="29/35/80/110", show_default=True)
@click.option("--capacity", default="10GiB", show_default=True, help="Of each node.")
@click.option("--processes", default=4, show_default=True, help="Node processes.")
def up(directory: Path, nodes: int, redundancy: str, capacity: str, processes: int) -> None:
    """Start a test network, or what is down of it; returns when it is ready."""
    net = TestNetwork(directory)
    if not net.exists:
        net.set_up(Settings(nodes, redundancy, capacity, processes))
    net.start()
    grant_path = net.directory / "access.grant"
    if not grant_path.exists():
        address = PeerAddress.parse(net.load()["satellite"]["address"])
        api_key = base64.urlsafe_b64decode(read_secret(net.directory / "api.key", "API key"))
        passphrase = read_secret(net.directory / "passphrase", "passphrase")
        write_durably(grant_path, make_grant(address, api_key, passphrase).serialize().encode())
    click.echo(f"test network is up; access grant: {grant_path}")


@testnet.command()
@directory_option
@json_option
def status(directory: Path, as_json: bool) -> None:
    """Show every process and node."""
    values = TestNetwork(directory).status()
    if as_json:
        click.echo(json.dumps(values, indent=2))
        return
    click.echo(f"satellite {values['satellite']['address']} pid {values['satellite']['pid']}")
    rows = [
        [
            n["id"][:12], n["address"], n["state"],
            "-" if n["stored_bytes"] is None else format_size(n["stored_bytes"]),
            "-" if n["pieces"] is None else n["pieces"],
        ]
        for n in values["nodes"]
    ]  # fmt: skip
    echo_rows([["node", "address", "state", "stored", "pieces"], *rows])


@testnet.command()
@directory_option
def down(directory: Path) -> None:
    """Stop everything cleanly."""
    TestNetwork(directory).stop()


@testnet.command()
@directory_option
@node_option
@click.option("--count", type=click.IntRange(1), help="So many nodes, chosen by --seed.")
@click.option("--seed", default=0, show_default=True)
@click.option("--satellite", is_flag=True, help="Kill the satellite.")
@more_argument
def kill(
    directory: Path,
    nodes: tuple[str, ...],
    count: int | None,
    seed: int,
    satellite: bool,
    more: tuple[str, ...],
) -> None:
    """Kill nodes or the satellite hard: nothing is flushed."""
    net = TestNetwork(directory)
    if satellite:
        net.kill_satellite()
    names = [*nodes, *more, *(net.choose(count, seed) if count else [])]
    if names:
        net.kill_nodes(names)
    elif not satellite:
        raise InvalidArgument("say what to kill: --count N, --node ID or --satellite")
    for name in names:
        click.echo(name)


@testnet.command()
@directory_option
@click.option("--satellite", is_flag=True, help="The satellite alone.")
@node_option
@more_argument
def revive(directory: Path, satellite: bool, nodes: tuple[str, ...], more: tuple[str, ...]) -> None:
    """Start killed nodes again (default: everything), and end faults."""
    net = TestNetwork(directory)
    if satellite:
        net.revive_satellite()
    else:
        net.revive([*nodes, *more] or None)


@testnet.command()
@directory_option
@node_option
@click.argument("words", nargs=-1, required=True, metavar="stall|slow=FACTOR|none")
def fault(directory: Path, nodes: tuple[str, ...], words: tuple[str, ...]) -> None:
    """Make nodes accept and stall, or be slow, or behave again."""
    if not nodes:
        raise InvalidArgument("say which: --node ID")
    *more, fault_text = words
    TestNetwork(directory).fault([*nodes, *more], fault_text)


@testnet.command()
@directory_option
@node_option
@more_argument
def corrupt(directory: Path, nodes: tuple[str, ...], more: tuple[str, ...]) -> None:
    """Damage the bytes that nodes store, one in every share."""
    if not nodes:
        raise InvalidArgument("say which: --node ID")
    count = TestNetwork(directory).corrupt([*nodes, *more])
    click.echo(f"damaged {count} shares")

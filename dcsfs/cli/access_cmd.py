"""`dcsfs access create`."""

import base64
import binascii
from pathlib import Path

import click

from dcsfs.access import AccessGrant
from dcsfs.cli.common import run_with_pool
from dcsfs.uplink.buckets import check_passphrase
from network import messages as m
from network.errors import InvalidArgument
from network.files import write_durably
from network.identity import PeerAddress
from network.rpc import ConnectionPool
from network.runtime import Runtime

FILE = click.Path(path_type=Path)


@click.group()
def access() -> None:
    """Make and inspect access grants."""


def read_secret(path: Path, what: str) -> bytes:
    """A secret file's content without its final newline; raises InvalidArgument."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"cannot read the {what} from {path}: {error.strerror}") from error
    return data.removesuffix(b"\n")


def make_grant(address: PeerAddress, api_key: bytes, passphrase: bytes) -> AccessGrant:
    """Ask the satellite for the project's salt and derive the grant; checks the passphrase."""

    async def ask(runtime: Runtime, pool: ConnectionPool) -> AccessGrant:
        project = await pool.call(address, m.PROJECT, m.ProjectRequest(api_key))
        grant = await runtime.offload(
            AccessGrant.from_passphrase, address, api_key, passphrase, project.salt
        )
        await check_passphrase(pool, grant)
        return grant

    return run_with_pool(ask)


@access.command()
@click.option("--satellite", required=True, help="ID@HOST:PORT.")
@click.option("--api-key-file", required=True, type=FILE)
@click.option("--passphrase-file", required=True, type=FILE)
@click.option("--out", required=True, type=FILE, help="Where to write the grant (mode 0600).")
def create(satellite: str, api_key_file: Path, passphrase_file: Path, out: Path) -> None:
    """Derive an access grant from an API key and a passphrase."""
    address = PeerAddress.parse(satellite)
    try:
        api_key = base64.b64decode(
            read_secret(api_key_file, "API key"), altchars=b"-_", validate=True
        )
    except binascii.Error as error:
        raise InvalidArgument(f"{api_key_file} does not hold an API key") from error
    grant = make_grant(address, api_key, read_secret(passphrase_file, "passphrase"))
    try:
        write_durably(out, grant.serialize().encode() + b"\n")
    except OSError as error:
        raise InvalidArgument(f"cannot write {out}: {error.strerror}") from error
    click.echo(f"access grant written to {out}; it opens your data, keep it secret")

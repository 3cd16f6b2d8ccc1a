"""`dcsfs mb` and `dcsfs rb`."""

import os
from pathlib import Path

import click

from dcsfs.cli.common import access_option, load_grant, parse_address, run_with_pool
from dcsfs.uplink import buckets
from network.errors import InvalidArgument


def _bucket_name(address: str) -> str:
    bucket, path = parse_address(address)
    if path:
        raise InvalidArgument(f"{address!r} names a path; give dcs://BUCKET")
    return bucket


@click.command()
@access_option
@click.argument("address", metavar="dcs://BUCKET")
def mb(access: Path | None, address: str) -> None:
    """Make a bucket."""
    name, grant = _bucket_name(address), load_grant(access)
    run_with_pool(
        lambda runtime, pool: buckets.create_bucket(
            runtime, pool, grant, name, os.getuid(), os.getgid()
        )
    )


@click.command()
@access_option
@click.argument("address", metavar="dcs://BUCKET")
def rb(access: Path | None, address: str) -> None:
    """Remove an empty bucket."""
    name, grant = _bucket_name(address), load_grant(access)
    run_with_pool(lambda runtime, pool: buckets.delete_bucket(pool, grant, name))

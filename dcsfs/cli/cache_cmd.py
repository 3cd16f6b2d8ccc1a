"""`dcsfs cache export`: staged data out of a cache directory, without the network."""

from pathlib import Path

import click

from dcsfs.access import load_access
from dcsfs.cli.common import find_access
from dcsfs.fs.export import LIST_NAME, export_cache
from network.runtime import SystemRuntime
from network.units import format_size


@click.group()
def cache() -> None:
    """Look after cache directories."""


@cache.command()
@click.option("--access", type=click.Path(path_type=Path), help="Access grant file.")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
def export(access: Path | None, directory: Path, target: Path) -> None:
    """Copy what is staged in cache DIRECTORY, and was not uploaded, to a new directory TARGET.

    Works without satellite and nodes, also when the grant was revoked. The cache is left as it is.
    """
    grant = load_access(find_access(access))
    found = export_cache(SystemRuntime(), grant, directory, target)
    parts = sum(not item.is_whole for item in found)
    staged = sum(end - start for item in found for start, end in item.ranges)
    click.echo(f"{len(found)} files with {format_size(staged)} of staged data in {target}")
    if parts:
        click.echo(
            f"{parts} of them were changed in part: the rest is on the network only; "
            f"{target / LIST_NAME} says which bytes are here"
        )

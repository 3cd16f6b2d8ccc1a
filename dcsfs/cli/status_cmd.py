"""`dcsfs status | sync | stat`."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import trio

from dcsfs import control
from dcsfs.cli.common import access_option, json_option, load_grant, parse_address
from dcsfs.library import FileInfo, open_project
from dcsfs.uplink.inspect import describe_placement
from network.units import format_size

SYNC_TIMEOUT_S = 24 * 3600.0


@click.command()
@json_option
@click.argument("mountpoint", required=False, type=click.Path(path_type=Path))
def status(as_json: bool, mountpoint: Path | None) -> None:
    """Show this user's mounts, or one of them."""
    if mountpoint is not None:
        found = [control.find_mount(mountpoint).status]
    else:
        found = [item.status for item in control.find_mounts()]
    if as_json:
        click.echo(json.dumps(found[0] if mountpoint is not None else found, indent=2))
        return
    if not found:
        click.echo("no mounts")
    for values in found:
        _echo_status(values)


def _echo_status(values: dict[str, Any]) -> None:
    mode = "read-only" if values["read_only"] else "read-write"
    if values["shared"]:
        mode += ", shared with others"
    if values["offline"]:
        mode += ", satellite not reached"
    click.echo(f"dcs://{values['bucket']} on {values['mountpoint']} ({mode}, pid {values['pid']})")
    click.echo(f"  waiting   {format_size(values['dirty_bytes'])}, {values['queue']} operations")
    click.echo(
        f"  sent      {format_size(values['sent_bytes'])} to nodes in {values['segments']} "
        f"segments, {values['satellite_transactions']} transactions"
    )
    click.echo(f"  received  {format_size(values['received_bytes'])} from nodes, all verified")
    click.echo(f"  cache     {values['cache_dir']}: {format_size(values['clean_bytes'])} clean")
    for node, reason in values["bad_nodes"].items():
        click.echo(f"  bad node  {node}: {reason}")
    for note in values["conflicts"]:
        click.echo(f"  conflict  {note}")
    if values["disk_failure"]:
        click.echo(
            f"  READ-ONLY {values['cache_dir']} failed: {values['disk_failure']}; staged data is "
            "being sent, then unmount and use another disk"
        )
    if values["last_error"]:
        click.echo(f"  problem   {values['last_error']} (staged data is safe locally)")


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
def sync(path: Path) -> None:
    """Return once everything on the mount at PATH is committed to the network."""
    found = control.find_mount(path)
    control.ask(found.socket, "sync", SYNC_TIMEOUT_S)


@click.command()
@access_option
@json_option
@click.argument("address", metavar="dcs://BUCKET/PATH | PATH")
def stat(access: Path | None, as_json: bool, address: str) -> None:
    """Show a file's extents, segments and nodes."""
    if address.startswith("dcs://"):
        values = _stat_remote(access, address)
    else:
        path = Path(os.path.abspath(address))
        found = control.find_mount(path)
        relative = path.relative_to(found.status["mountpoint"])
        values = control.ask(found.socket, "stat", path=str(relative))
    if as_json:
        click.echo(json.dumps(values, indent=2))
        return
    click.echo(f"inode {values['inode']}, {values['size']} bytes")
    for extent in values["extents"]:
        click.echo(
            f"  {extent['file_offset']:>14} +{extent['length']:<10} segment {extent['segment']}"
        )
    for name, segment in values.get("segments", {}).items():
        click.echo(f"  segment {name}: {len(segment['pieces'])} pieces, {segment['redundancy']}")


def _stat_remote(access: Path | None, address: str) -> dict[str, Any]:
    grant = load_grant(access)
    bucket_name, path = parse_address(address)

    async def run() -> dict[str, Any]:
        async with open_project(grant) as project:
            async with project.open_bucket(bucket_name, read_only=True) as bucket:
                info: FileInfo = await bucket.stat(path)
                values: dict[str, Any] = asdict(info) | {"kind": info.kind.name.lower()}
                mounted = bucket.mounted
                inode = mounted.filesystem.inode(info.inode)
                rows = [] if inode.is_directory else await mounted.reader.rows_of(inode)
                values |= await describe_placement(mounted.client, rows, inode.placements)
                return values

    return trio.run(run)

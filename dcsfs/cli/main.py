"""The `dcsfs` command.

Exit codes: 0 success; 1 refused or failed, with a sentence on stderr; 2 wrong usage.
"""

import click

from dcsfs.cli import (
    access_cmd,
    bucket_cmd,
    cache_cmd,
    mount_cmd,
    object_cmd,
    status_cmd,
    testnet_cmd,
)
from network.process import ErrorGroup, configure_logging


@click.group(cls=ErrorGroup)
@click.option("-v", "--verbose", is_flag=True, help="Log every lifecycle event.")
def main(verbose: bool) -> None:
    """A decentralised cloud store, mounted as a file system."""
    configure_logging(verbose)


for command in (
    access_cmd.access,
    bucket_cmd.mb,
    bucket_cmd.rb,
    object_cmd.ls,
    object_cmd.cp,
    object_cmd.rm,
    object_cmd.cat,
    status_cmd.stat,
    mount_cmd.mount,
    mount_cmd.umount,
    status_cmd.status,
    status_cmd.sync,
    cache_cmd.cache,
    testnet_cmd.testnet,
):
    main.add_command(command)

if __name__ == "__main__":
    main()

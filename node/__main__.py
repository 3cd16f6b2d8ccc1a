"""`python -m node` is `dcs-node`."""

from node.cli import main

main()

"""`python -m satellite` is `dcs-satellite`."""

from satellite.cli import main

main()

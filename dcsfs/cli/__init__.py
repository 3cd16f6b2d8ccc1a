"""The `dcsfs` command: one module per command (docs/operating/cli.md lists exit codes)."""

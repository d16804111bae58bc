"""The command line: one group, `main`."""

from semkv_deploy.cli.commands import main

__all__ = ["main"]

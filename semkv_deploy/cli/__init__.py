"""The command line: `main` is the group; a file a command, `options` that they share, `console` for the terminal."""

from semkv_deploy.cli.main import main

__all__ = ["main"]

"""The command line: one file per command. It parses options, calls `maskrcnn.api`, and prints."""

from maskrcnn.cli.commands import app, main

__all__ = ["app", "main"]

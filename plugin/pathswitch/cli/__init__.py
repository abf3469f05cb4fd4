"""The command ``pathswitch``."""

from pathswitch.cli.app import main

__all__ = ["main"]

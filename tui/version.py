"""The flag ``--version``."""

from __future__ import annotations

import argparse
from typing import NoReturn


class VersionAction(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> NoReturn:
        """Ends the program."""
        from importlib.metadata import PackageNotFoundError, version

        try:
            text = version("run-local")
        except PackageNotFoundError:
            text = "(not installed)"
        print(f"run-local {text}")
        raise SystemExit(0)

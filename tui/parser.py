"""The argument parser of every command: its errors are the program's own, the version is looked up when asked for."""

from __future__ import annotations

import argparse
from typing import NoReturn

from offload.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse would print and leave."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class Version(argparse.Action):
    """Prints the version of the installed package and leaves."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        try:
            text = version("run-local")
        except PackageNotFoundError:
            text = "(not installed)"
        print(f"run-local {text}")
        raise SystemExit(0)

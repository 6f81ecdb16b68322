"""The flags of ``chat`` about saved conversations, and which front end a terminal gets."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from offload.config import SamplingSettings
from offload.errors import UsageError
from tui.session import Session
from tui.store import Store, conversations_folder
from tui.tables import table


def add_saved_flags(parser: argparse.ArgumentParser) -> None:
    """Register them."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--resume", metavar="ID", help="go on with a saved conversation; the beginning of its id will do"
    )
    which.add_argument("--continue", action="store_true", dest="latest", help="go on with the latest conversation")
    which.add_argument("--list", action="store_true", help="list the saved conversations and leave")


def find_saved(arguments: argparse.Namespace) -> Path | None:
    """The file of the conversation to go on with, if one was asked for. Raises UsageError if there is no such one."""
    if arguments.resume is None and not arguments.latest:
        return None
    store = _store()
    return store.latest() if arguments.latest else store.find(arguments.resume)


def list_saved() -> str:
    """A table of all conversations, the latest first."""
    rows = [("ID", "CHANGED", "QUESTIONS", "MODEL", "TITLE")]
    for saved in _store().list():
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(saved.changed))
        rows.append((saved.id, when, str(len(saved.conversation.turns)), saved.model, saved.name))
    return table(rows, right=(2,))


def plain_session(
    saved: Path | None, sampling: SamplingSettings, system: str | None, on_problem: Callable[[str], None]
) -> Session:
    """What the plain console talks in: nothing of it is saved unless it goes on with a saved conversation."""
    session = Session(None, sampling, system, on_problem)
    if saved is not None:
        session.resume(saved)
        if system is not None:
            session.set_system(system)
    return session


def is_full_terminal(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a full-screen program can run: terminals on both sides, and one that can move its cursor."""
    return sys.stdin.isatty() and sys.stdout.isatty() and environ.get("TERM", "") not in ("", "dumb")


def _store() -> Store:
    folder = conversations_folder()
    if folder is None:
        raise UsageError("there is no folder for conversations: this user has no home; set XDG_DATA_HOME")
    return Store(folder)

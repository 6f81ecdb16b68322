"""Conversations on disk, saved as they grow: one file each, lines of JSON that are only ever appended.

A line is written whole, so what a crash can lose is the end of the line being written; it is dropped when the file is
read. An answer is written in parts while it comes; one without an end (the program was killed) reads as stopped.

Lines are objects with a ``type``: ``start`` (id, created, model, system), ``system`` (text), ``model`` (name),
``title`` (text), ``ask`` (kept, text: the question that follows the first ``kept`` turns; the others are given up if it
becomes a turn), ``part`` (text), ``end`` (text, reason; a reason of null: it became no turn), ``cut`` (kept: give up
the turns after the first ``kept``). ``part`` and ``end`` may also have ``reasoning``, what the model thought; in files
of older versions that is in the text, between tags.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from offload.errors import RunLocalError, UsageError
from tui.conversation import Conversation, Turn
from tui.text import one_line

_SUFFIX = ".jsonl"
_TITLE_LENGTH = 60
_OPENING, _CLOSING = "<think>", "</think>"


def conversations_folder() -> Path | None:
    """``$XDG_DATA_HOME/run-local/conversations`` or that below ``~/.local/share``. None for a user without a home."""
    given = os.environ.get("XDG_DATA_HOME", "")
    if os.path.isabs(given):
        return Path(given) / "run-local" / "conversations"
    try:
        return Path.home() / ".local" / "share" / "run-local" / "conversations"
    except RuntimeError:
        return None


@dataclass(slots=True)
class Saved:
    """A conversation as its file tells it. ``changed`` is the time of the last change in seconds since 1970."""

    id: str
    model: str = ""
    title: str = ""
    created: str = ""
    changed: float = 0.0
    conversation: Conversation = field(default_factory=Conversation)

    @property
    def name(self) -> str:
        """Its title, or the beginning of the first question."""
        turns = self.conversation.turns
        first = self.title or (turns[0].question if turns else "")
        text = one_line(first)
        return text if len(text) <= _TITLE_LENGTH else text[: _TITLE_LENGTH - 1] + "…"


class Store:
    """The folder of all conversations."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def list(self, words: str = "") -> list[Saved]:
        """The conversations that hold all of ``words``, the latest first. What cannot be read is left out."""
        wanted = words.casefold().split()
        found = []
        with suppress(OSError):
            for path in self.folder.glob(f"*{_SUFFIX}"):
                with suppress(OSError, RunLocalError):
                    saved = read_saved(path)
                    if saved.conversation.turns and all(word in _all_text(saved) for word in wanted):
                        found.append(saved)
        return sorted(found, key=lambda saved: (saved.changed, saved.id), reverse=True)

    def find(self, id: str) -> Path:
        """The file of the one conversation whose id begins with ``id``. Raises UsageError if there is not one."""
        names = sorted(path.name for path in self.folder.glob(f"*{_SUFFIX}")) if self.folder.is_dir() else []
        found = [name for name in names if id and name.startswith(id)]
        exact = [name for name in found if name == id + _SUFFIX]
        if len(exact or found) != 1:
            what = "more than one conversation begins" if found else "there is no conversation that begins"
            raise UsageError(f"{what} with '{id}'; run-local chat --list shows them")
        return self.folder / (exact or found)[0]

    def latest(self) -> Path:
        """The file of the conversation that was changed last. Raises UsageError if there is none."""
        found = self.list()
        if not found:
            raise UsageError("there is no conversation to go on with yet")
        return self.folder / (found[0].id + _SUFFIX)

    def delete(self, id: str) -> Saved:
        """Delete a conversation for good. Raises UsageError if there is no such one, RunLocalError if it is in use."""
        path = self.find(id)
        saved = read_saved(path)
        writer = Writer(path)  # refused while another chat writes it
        try:
            path.unlink()
        except OSError as error:
            raise RunLocalError(f"{path}: cannot be deleted ({error.strerror})") from error
        finally:
            writer.close()
        return saved

    def rename(self, id: str, title: str) -> None:
        """Give a conversation a title. Raises UsageError if there is no such one, RunLocalError if it is in use."""
        writer = Writer(self.find(id))
        try:
            writer.write("title", text=title)
        finally:
            writer.close()

    def create(self, model: str, system: str | None) -> Writer:
        """Begin a new file. Raises RunLocalError if it cannot be written."""
        id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        writer = Writer(self.folder / (id + _SUFFIX))
        created = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        writer.write("start", id=id, created=created, model=model, system=system)
        return writer


class Writer:
    """Appends to one conversation's file, which no other chat may write meanwhile. Methods raise RunLocalError."""

    def __init__(self, path: Path) -> None:
        """Open or create ``path``; an unfinished last line, and an unfinished answer, are ended first."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)  # what people say is private
            self._file: BinaryIO = os.fdopen(descriptor, "r+b", buffering=0)
        except OSError as error:
            raise RunLocalError(f"{path}: the conversation cannot be saved ({error.strerror})") from error
        try:
            self._lock()
            size = self._file.seek(0, os.SEEK_END)
            self._file.seek(max(0, size - 1))
            if size and self._file.read(1) != b"\n":
                self._file.write(b"\n")
        except BaseException:
            self._file.close()
            raise

    @property
    def id(self) -> str:
        return self.path.name.removesuffix(_SUFFIX)

    def write(self, type: str, *, sync: bool = False, **values: Any) -> None:
        """Append a line; with ``sync`` it is on the disk when this returns."""
        line = json.dumps({"type": type, **values}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        try:
            self._file.write(line)
            if sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise RunLocalError(f"{self.path}: the conversation cannot be saved ({error.strerror})") from error

    def close(self) -> None:
        """Safe to call twice."""
        self._file.close()

    def _lock(self) -> None:
        import fcntl

        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunLocalError(f"{self.id}: this conversation is open in another chat; leave that one first") from None
        except OSError:
            pass  # a file system without locks


def read_saved(path: Path) -> Saved:
    """Read a conversation. Raises RunLocalError if the file is none."""
    saved = Saved(path.name.removesuffix(_SUFFIX))
    try:
        saved.changed = path.stat().st_mtime
        lines = list(_lines(path))
    except OSError as error:
        raise RunLocalError(f"{path}: cannot be read ({error.strerror})") from error
    if not lines or lines[0].get("type") != "start":
        raise RunLocalError(f"{path}: not a conversation")
    reader = _Reader(saved)
    for line in lines:
        reader.take(line)
    reader.end_answer(None, "cancelled")
    return saved


class _Reader:
    """Follows the lines of a file."""

    def __init__(self, saved: Saved) -> None:
        self._saved = saved
        self._asked: tuple[list[Turn], str] | None = None
        self._parts: list[str] = []
        self._thoughts: list[str] = []

    def take(self, line: dict[str, Any]) -> None:
        saved, talk = self._saved, self._saved.conversation
        match line:
            case {"type": "start", "model": str(model), "created": str(created)}:
                saved.model, saved.created, talk.system = model, created, line.get("system")
            case {"type": "system"}:
                talk.system = line.get("text")
            case {"type": "model", "name": str(name)}:
                saved.model = name
            case {"type": "title", "text": str(text)}:
                saved.title = text
            case {"type": "ask", "kept": int(kept), "text": str(text)}:
                self.end_answer(None, "cancelled")
                self._asked, self._parts, self._thoughts = (talk.turns[:kept], text), [], []
                talk.pending = (text, talk.turns[:kept])
            case {"type": "part", "text": str(text)}:
                self._parts.append(text)
                self._thoughts.append(str(line.get("reasoning", "")))
            case {"type": "end"}:
                self.end_answer(line.get("text"), line.get("reason"), line.get("reasoning"))
            case {"type": "cut", "kept": int(kept)}:
                talk.turns, talk.pending = talk.turns[:kept], None

    def end_answer(self, text: str | None, reason: Any, reasoning: str | None = None) -> None:
        """The answer is over: as a turn, unless it has no reason or (its end was never written) no text."""
        if self._asked is None:
            return
        (kept, question), self._asked = self._asked, None
        answer = "".join(self._parts) if text is None else text
        if reasoning is None:
            reasoning = "".join(self._thoughts) if text is None else ""
        if reason is None or (reason == "cancelled" and not answer):
            return
        if not reasoning:
            answer, reasoning = without_thought(answer)
        talk = self._saved.conversation
        talk.turns, talk.pending = [*kept, Turn(question, answer, reason, reasoning)], None


def without_thought(answer: str) -> tuple[str, str]:
    """(the reply, the reasoning) of an answer of which no reasoning was saved.

    Files that were written before reasoning was told apart have it in the answer. What begins with the opening tag is
    reasoning, up to the closing one; tags anywhere else are the reply's own.
    """
    begun = answer.lstrip()
    if not begun.startswith(_OPENING):
        return answer, ""
    reasoning, _, reply = begun.removeprefix(_OPENING).partition(_CLOSING)
    return reply.lstrip(), reasoning.strip()


def thought(reasoning: str) -> dict[str, Any]:
    """What a line tells of reasoning, if there is any."""
    return {"reasoning": reasoning} if reasoning else {}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            with suppress(ValueError):  # a line that a crash has torn
                line = json.loads(text)
                if isinstance(line, dict):
                    yield line


def _all_text(saved: Saved) -> str:
    parts = [saved.title, saved.model, saved.id, saved.conversation.system or ""]
    parts += [text for turn in saved.conversation.turns for text in (turn.question, turn.answer)]
    return "\n".join(parts).casefold()

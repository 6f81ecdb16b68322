"""The rows of a batch: JSON objects in, JSON objects out. Standard library only."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace

from offload.config import SamplingSettings
from offload.errors import UsageError
from offload.events import FinishReason
from offload.protocol import Message

RowId = str | int
_REASONING = "reasoning_content"  # as chat templates call it
_ROLES = ("system", "user", "assistant")
_FIELDS = frozenset(("id", "prompt", "messages", *SamplingSettings.field_names()))


@dataclass(frozen=True, slots=True)
class InputRow:
    """One row as it will run. With ``error`` it cannot run and the other fields say nothing but ``id``."""

    id: RowId
    prompt: str | tuple[Message, ...] = ""
    sampling: SamplingSettings | None = None
    error: str | None = None

    @property
    def key(self) -> str:
        """What tells ids apart: 1 and "1" are two."""
        return id_key(self.id)


@dataclass(frozen=True, slots=True)
class OutputRow:
    """One line of the output. Token counts are None where nothing ran, ``reasoning`` if the model did not think before
    it answered; ``error`` is None if all went well.
    """

    id: RowId
    text: str | None
    finish_reason: FinishReason
    prompt_tokens: int | None
    new_tokens: int | None
    error: str | None
    reasoning: str | None = None

    def to_line(self) -> bytes:
        """UTF-8 JSON that ends in a line feed."""
        return (json.dumps(asdict(self), ensure_ascii=False) + "\n").encode("utf-8", errors="replace")


def id_key(row_id: RowId) -> str:
    return json.dumps(row_id)


def row_seed(base_seed: int, row_id: RowId) -> int:
    """The seed of a row: it depends on ``--seed`` and the row's id, never on the rows before it."""
    digest = hashlib.sha256(f"{base_seed}:{id_key(row_id)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def parse_row(line: bytes, number: int, sampling: SamplingSettings, base_seed: int) -> InputRow:
    """The row in ``line``, the ``number``-th of its file (from 1). A bad one comes back with ``error`` set.

    A row without an id is called ``line-N``.
    """
    row_id: RowId = f"line-{number}"
    try:
        row = _load_object(line)
        row_id = _row_id(row, row_id)
        unknown = sorted(set(row) - _FIELDS)
        if unknown:
            names = ", ".join(ascii(name) for name in unknown)
            raise UsageError(f"unknown fields: {names}; known are {', '.join(sorted(_FIELDS))}")
        overrides = {name: row[name] for name in SamplingSettings.field_names() if name in row}
        prompt = _prompt(row)
        sampling = replace(sampling, seed=row_seed(base_seed, row_id)).overridden(overrides)
        if not all(_encodable(stop) for stop in sampling.stop):
            raise UsageError("stop: holds half of a surrogate pair, which is no character")
    except UsageError as error:
        # sampling errors name the flag; in a row it is a field
        return InputRow(row_id, error=re.sub(r"--([a-z-]+)", lambda flag: flag[1].replace("-", "_"), str(error)))
    return InputRow(row_id, prompt, sampling)


def _load_object(line: bytes) -> dict[str, object]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"not valid UTF-8 at byte {error.start} of the line") from None
    try:
        row = json.loads(text.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        raise UsageError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        raise UsageError(f"not valid JSON: {type(error).__name__}") from None
    if not isinstance(row, dict):
        raise UsageError("the row is no JSON object")
    return row


def _row_id(row: dict[str, object], otherwise: RowId) -> RowId:
    row_id = row.get("id")
    if row_id is None:
        return otherwise
    if isinstance(row_id, bool) or not isinstance(row_id, str | int):
        raise UsageError("id: must be a string or a whole number")
    if isinstance(row_id, str) and not _encodable(row_id):
        raise UsageError("id: holds half of a surrogate pair, which is no character")
    return row_id


def _prompt(row: dict[str, object]) -> str | tuple[Message, ...]:
    if ("prompt" in row) == ("messages" in row):
        raise UsageError("the row must have exactly one of 'prompt' and 'messages'")
    if "prompt" in row:
        return _checked_text(row["prompt"], "prompt")
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise UsageError("messages: must be a list of at least one message")
    checked = tuple(_message(message, f"messages[{index}]") for index, message in enumerate(messages))
    if checked[-1]["role"] != "user":
        raise UsageError("messages: the last one must have the role 'user'")
    return checked


def _message(message: object, where: str) -> Message:
    if not isinstance(message, dict) or set(message) - {_REASONING} != {"role", "content"}:
        raise UsageError(
            f"{where}: must be an object with 'role' and 'content' alone (and '{_REASONING}' of an answer)"
        )
    if message["role"] not in _ROLES:
        raise UsageError(f"{where}: the role must be one of {', '.join(_ROLES)}")
    answer = message["role"] == "assistant"
    checked = {"role": message["role"], "content": _checked_text(message["content"], f"{where}.content", answer)}
    if _REASONING in message:
        if not answer:
            raise UsageError(f"{where}: only an assistant's message has '{_REASONING}'")
        checked[_REASONING] = _checked_text(message[_REASONING], f"{where}.{_REASONING}", may_be_empty=True)
    return checked


def _checked_text(text: object, where: str, may_be_empty: bool = False) -> str:
    if not isinstance(text, str):
        raise UsageError(f"{where}: must be a string")
    if not may_be_empty and not text.strip():
        raise UsageError(f"{where}: is empty")
    if not _encodable(text):
        raise UsageError(f"{where}: holds half of a surrogate pair, which is no character")
    return text


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True

"""Write a conversation to a file that did not exist before."""

from __future__ import annotations

import json
from pathlib import Path

from offload.errors import RunLocalError, UsageError
from tui.conversation import Conversation


def save_conversation(conversation: Conversation, model_name: str, path: Path) -> None:
    """Markdown (``.md``) or JSON (``.json``, its ``messages`` as a batch row has them), by suffix.

    Raises UsageError for another suffix or an existing file, RunLocalError if it cannot be written; nothing is left
    behind then.
    """
    writers = {".md": to_markdown, ".markdown": to_markdown, ".json": to_json}
    writer = writers.get(path.suffix.lower())
    if writer is None:
        raise UsageError(f"{path}: the name must end in .md or .json")
    text = writer(conversation, model_name)
    try:
        file = open(path, "x", encoding="utf-8", errors="replace")  # noqa: SIM115 - its failure is told apart
    except FileExistsError:
        raise UsageError(f"{path}: exists already; choose another name") from None
    except (OSError, ValueError) as error:
        raise RunLocalError(f"{path}: cannot be created ({getattr(error, 'strerror', None) or error})") from error
    try:
        with file:
            file.write(text)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise RunLocalError(f"{path}: cannot be written ({error.strerror})") from error


def to_json(conversation: Conversation, model_name: str) -> str:
    reasons = [turn.finish_reason for turn in conversation.turns]
    content = {"model": model_name, "messages": conversation.messages(), "finish_reasons": reasons}
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def to_markdown(conversation: Conversation, model_name: str) -> str:
    parts = [f"# Conversation with {model_name}"]
    if conversation.system:
        parts += ["## System", conversation.system]
    for turn in conversation.turns:
        stopped = " (stopped)" if turn.finish_reason == "cancelled" else ""
        parts += ["## Question", turn.question, f"## Answer{stopped}", turn.answer]
    return "\n\n".join(parts) + "\n"

"""The one question that ``chat`` is given to answer."""

from __future__ import annotations

import sys

from offload.errors import UsageError
from tui.text import check_text, decode


def read_question(given: str | None) -> str | None:
    """The one question to answer: from the command line, standard input, or both; None if the user will type.

    Raises UsageError for an empty one.
    """
    text = check_text(given, "the question") if given is not None else None
    if text is not None and not text.strip():
        raise UsageError("the question is empty")
    if sys.stdin.isatty():
        return text
    piped = decode(sys.stdin.buffer.read(), "standard input").rstrip("\r\n")
    if text is None and not piped.strip():
        raise UsageError("standard input is empty; give a question there or after 'chat'")
    return "\n\n".join(part for part in (text, piped) if part is not None and part.strip())

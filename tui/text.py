"""Text that comes from outside, made safe for a terminal and checked before a tokenizer sees it."""

from __future__ import annotations

import os

from offload.errors import UsageError

# Everything that can move the cursor or start an escape sequence; line feed and tab stay.
_CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """``text`` without control characters: a model's answer must not be able to drive the terminal."""
    return text.translate(_CONTROL)


def one_line(text: str) -> str:
    """``text`` for a message of one line."""
    return printable(" ".join(text.split()))


def decode(data: bytes, source: str) -> str:
    """Text of UTF-8 ``data``, without a byte order mark. Raises UsageError naming ``source`` and the bad byte."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UsageError(f"{source}: not valid UTF-8 at byte {error.start} (0x{data[error.start]:02x})") from None


def check_text(text: str, source: str) -> str:
    """``text`` as it is. Raises UsageError if it came from bytes that were not UTF-8 (an argument, a variable)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        offset = len(os.fsencode(text[: error.start]))
        raise UsageError(f"{source}: not valid UTF-8 at byte {offset}") from None
    return text

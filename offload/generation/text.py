"""From token ids to text that can be shown: whole characters only, and never a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\ufffd"
_CONTEXT_IDS = 6  # decoders look back a few ids (leading spaces, byte sequences)


class Detokenizer:
    """Incremental detokenisation that never shows half a character.

    Decodes a short window twice, with and without the new ids, and shows the difference once it no longer ends in an
    incomplete character. Works with every tokenizer, also those that drop a leading space. The method is vLLM's
    (``detokenize_incrementally``).
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT_IDS:])
        self._window = 0
        self._shown = len(self._ids)

    def add(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._pending()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._window, self._shown = self._shown, len(self._ids)
        return text

    def flush(self) -> str:
        """What is left at the end of the answer, incomplete characters as replacement signs."""
        text = self._pending()
        self._window, self._shown = self._shown, len(self._ids)
        return text

    def _pending(self) -> str:
        before = self._decode(self._ids[self._window : self._shown])
        return self._decode(self._ids[self._window :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopStrings:
    """Finds stop strings across token borders and holds back text that may be the start of one.

    Where several overlap, the one that is complete first counts, and of those that end together the longest: what is
    shown depends on the text alone, not on how it is cut into tokens.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """The part of the text so far that can be shown. Sets :attr:`found`; nothing after a stop string is shown."""
        if not self._stops or self.found:
            return "" if self.found else text
        self._held += text
        places = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            _, start = min(places)
            shown, self._held = self._held[:start], ""
            return shown
        keep = max(overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What was held back, when the answer ends without a stop string."""
        shown, self._held = self._held, ""
        return shown


def overlap(text: str, word: str) -> int:
    """Length of the longest end of ``text`` that is the beginning of ``word``, but not all of it."""
    for length in range(min(len(word) - 1, len(text)), 0, -1):
        if text.endswith(word[:length]):
            return length
    return 0

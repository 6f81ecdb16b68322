"""From the tokens of an answer to what can be shown of it: its reasoning, and the reply."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offload.generation.reasoning import HARMONY_MARKS, TAGS, HarmonySplitter, Piece, Splitter, TagSplitter
from offload.generation.text import Detokenizer, StopStrings
from offload.model.prompt import added_tokens

_TAIL_IDS = 64
"""As far back in a prompt the beginning of the answer's message is looked for."""
_TOOL = re.compile(r"tool|call|args|invoke|python_tag", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How a model writes its answers. ``marks`` are the tokens that say what a part of an answer is, or that belong to
    a call of a tool and would not be shown as special tokens are not.
    """

    marks: Mapping[int, str]
    harmony: bool

    @classmethod
    def of(cls, tokenizer: Any) -> AnswerForm:
        added = added_tokens(tokenizer)
        special = set(tokenizer.all_special_ids)
        special |= {id for id, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
        harmony = all(mark in added for mark in ("<|start|>", "<|channel|>", "<|message|>"))
        marks = {
            id: text
            for text, id in added.items()
            if (text in HARMONY_MARKS if harmony else _of_tags(text)) or (id in special and _TOOL.search(text))
        }
        return cls(marks, harmony)

    def splitter(self, tokenizer: Any, prompt: Sequence[int]) -> Splitter:
        """What tells the parts of an answer to ``prompt`` apart: a prompt may have opened the reasoning already."""
        tail = list(prompt[-_TAIL_IDS:])
        if not self.harmony:
            said = tokenizer.decode(tail, skip_special_tokens=False).rstrip()
            return TagSplitter(inside=next((tags for tags in TAGS if said.endswith(tags.opening)), None))
        starts = [place for place, token in enumerate(tail) if self.marks.get(token) == "<|start|>"]
        if not starts:
            return HarmonySplitter(header=None)
        splitter = HarmonySplitter()
        for token in tail[starts[-1] + 1 :]:
            mark = self.marks.get(token)
            splitter.add(tokenizer.decode([token]) if mark is None else mark, own=mark is not None)
        return splitter


def _of_tags(text: str) -> bool:
    return any(text == tags.closing or tags.opening.startswith(text) for tags in TAGS)


class AnswerText:
    """One answer as it grows: ``text`` is the reply so far, ``reasoning`` what came before. ``stops`` end the reply."""

    def __init__(self, tokenizer: Any, form: AnswerForm, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._marks = form.marks
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._splitter = form.splitter(tokenizer, prompt)
        self._stops = StopStrings(stops)
        self._pieces: list[Piece] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stops.found

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self._pieces)

    @property
    def reasoning(self) -> str:
        return "".join(piece.reasoning for piece in self._pieces)

    def add(self, token: int, ends: bool) -> Piece:
        """What ``token`` lets be shown; ``ends``: it is an end token, and no text."""
        mark = self._marks.get(token)
        if mark is None and not ends:
            return self._take(self._splitter.add(self._detokenizer.add(token)))
        piece = self._splitter.add(self._detokenizer.flush())
        return self._take(piece if mark is None else piece.plus(self._splitter.add(mark, own=True)))

    def flush(self) -> Piece:
        """What was held back, at the end of the answer; nothing after a stop string."""
        piece = self._take(self._splitter.add(self._detokenizer.flush()).plus(self._splitter.flush()))
        if self.stopped:
            return piece
        rest = Piece(self._stops.flush())
        self._pieces.append(rest)
        return piece.plus(rest)

    def _take(self, piece: Piece) -> Piece:
        shown = Piece(self._stops.add(piece.text), piece.reasoning)
        self._pieces.append(shown)
        return shown

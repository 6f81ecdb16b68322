"""Which part of an answer is reasoning. Works on text that arrives in pieces; knows no tokenizer.

Two forms are in use. Most models put their reasoning between a pair of tags. gpt-oss writes messages in channels, the
harmony format: ``<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...``. Sources:
the published chat templates of each family, and the openai-cookbook repository's ``articles/openai-harmony.md``.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from offload.generation.text import overlap


class Tags(NamedTuple):
    opening: str
    closing: str


TAGS = (
    Tags("<think>", "</think>"),  # DeepSeek, Qwen, GLM, Kimi, MiniMax, Nemotron, Ernie, Hunyuan, ...
    Tags("[THINK]", "[/THINK]"),  # Mistral
    Tags("<|channel>thought", "<channel|>"),  # Gemma 4
    Tags("<mm:think>", "</mm:think>"),  # MiniMax M3
    Tags("<seed:think>", "</seed:think>"),  # Seed-OSS
    Tags("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
)

HARMONY_MARKS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")


class Piece(NamedTuple):
    """What can be shown now: of the reply, and of the reasoning, which comes before it as a rule."""

    text: str = ""
    reasoning: str = ""

    def plus(self, other: Piece) -> Piece:
        return Piece(self.text + other.text, self.reasoning + other.reasoning)


class Splitter(ABC):
    """Takes an answer piece by piece and tells reasoning from the reply. Parts of one kind are set a line apart."""

    def __init__(self) -> None:
        self._latest: bool | None = None
        self._said = {True: False, False: False}  # whether there was reasoning, and a reply

    @abstractmethod
    def add(self, text: str, own: bool = False) -> Piece:
        """The next piece of the answer; ``own``: it is one token that the tokenizer has for just this text."""

    @abstractmethod
    def flush(self) -> Piece:
        """What was held back, at the end of the answer."""

    def _show(self, text: str, reasoning: bool = False) -> Piece:
        if not text:
            return Piece()
        if self._said[reasoning] and self._latest is not reasoning:
            text = "\n\n" + text
        self._latest, self._said[reasoning] = reasoning, True
        return Piece("", text) if reasoning else Piece(text)


class TagSplitter(Splitter):
    """Reasoning stands between tags: at the beginning of the answer, or wherever the model has a token for the tag.

    Text that only mentions a tag, in the middle of a reply, stays as it is. White space around the reasoning is not
    shown. ``inside``: the prompt has opened these tags already.
    """

    def __init__(self, tags: Sequence[Tags] = TAGS, inside: Tags | None = None) -> None:
        super().__init__()
        self._tags = tuple(tags)
        self._inside = inside
        self._may_open = inside is None
        self._trim = inside is not None  # white space is not shown before the next text
        self._held = ""  # may become a tag, or is white space that only shows before something else

    def add(self, text: str, own: bool = False) -> Piece:
        piece = Piece()
        if own and self._inside is None:
            if any(text == tags.closing for tags in self._tags):
                return piece  # it never began, or the prompt has closed it
            if any(tags.opening.startswith(text) for tags in self._tags):
                if self._held.strip():
                    piece = self._reply(self._held)
                self._held, self._may_open = "", True
        text, self._held = self._held + text, ""
        while text:
            if self._inside is not None:
                thought, text = self._think(text, self._inside)
                piece = piece.plus(thought)
            elif self._may_open:
                text = self._open(text)
            else:
                piece, text = piece.plus(self._reply(text)), ""
        return piece

    def flush(self) -> Piece:
        held, self._held = self._held, ""
        return self._reply(held) if self._inside is None else self._show(held.rstrip(), reasoning=True)

    def _think(self, text: str, tags: Tags) -> tuple[Piece, str]:
        """The reasoning in ``text`` that can be shown, and what is left once it has ended."""
        thought, closing, rest = text.partition(tags.closing)
        if not closing:
            keep = overlap(thought, tags.closing)
            thought, rest = thought[: len(thought) - keep], thought[len(thought) - keep :]
        if self._trim:
            thought = thought.lstrip()
        end = len(thought.rstrip())
        if closing:
            self._inside, self._trim = None, True
        else:
            self._held, rest = thought[end:] + rest, ""
            self._trim = self._trim and not end
        return self._show(thought[:end], reasoning=True), rest

    def _open(self, text: str) -> str:
        """What is left of ``text`` to look at: nothing while it may be the beginning of a tag."""
        begun = text.lstrip()
        for tags in self._tags:
            if begun.startswith(tags.opening):
                self._inside, self._trim, self._may_open = tags, True, False
                return begun.removeprefix(tags.opening)
        if any(tags.opening.startswith(begun) for tags in self._tags):
            self._held = text
            return ""
        self._may_open = False
        return text

    def _reply(self, text: str) -> Piece:
        if self._trim:
            text = text.lstrip()
            self._trim = not text
        return self._show(text)


_RECIPIENT = re.compile(r"\bto=\S")
_LONGEST_HEADER = 200
"""Characters; what is longer is no header but the text of a model that has forgotten the format."""


class HarmonySplitter(Splitter):
    """Messages in channels: ``analysis`` is reasoning, all else is the reply; calls of tools are shown as they are.

    ``header``: the answer begins in the header of a message (as after ``<|start|>assistant``), of which this is known
    already; None: it begins in the text of a reply.
    """

    def __init__(self, header: str | None = "") -> None:
        super().__init__()
        self._header = header
        self._reasoning = False
        self._call = False

    def add(self, text: str, own: bool = False) -> Piece:
        if own and text in HARMONY_MARKS:
            return self._mark(text)
        if self._header is None:
            return self._show(text, self._reasoning)
        self._header += text
        return self._no_header() if len(self._header) > _LONGEST_HEADER else Piece()

    def flush(self) -> Piece:
        said = any(self._said.values()) or "<|channel|>" in (self._header or "")
        return Piece() if said else self._no_header()

    def _mark(self, mark: str) -> Piece:
        if self._header is not None and mark == "<|message|>":
            header, self._header, self._latest = self._header, None, None
            self._call = bool(_RECIPIENT.search(header))
            channel = header.partition("<|channel|>")[2].split(maxsplit=1)
            self._reasoning = not self._call and channel[:1] == ["analysis"]
            return self._show(header.removeprefix("assistant") + mark) if self._call else Piece()
        if self._header is not None and mark in ("<|channel|>", "<|constrain|>"):
            self._header += mark
            return Piece()
        piece = self._show(mark) if self._call and self._header is None else Piece()
        if mark not in ("<|channel|>", "<|constrain|>", "<|message|>"):
            self._header, self._call = "", False
        return piece

    def _no_header(self) -> Piece:
        text, self._header, self._reasoning = (self._header or "").removeprefix("assistant"), None, False
        return self._show(text.replace("<|channel|>", "").replace("<|constrain|>", ""))

"""Markdown that grows: what is complete is settled once, so that a long answer costs no more at its end."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rich.markdown import Markdown

LONGEST_TAIL = 60
"""Lines of one unfinished block before it is settled in pieces: a listing, a list or a table of thousands of lines."""
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*([^`\s]*)[^`\n]*\n")


@dataclass(frozen=True, slots=True)
class Block:
    """A top-level block of Markdown, or a piece of one. ``first`` is False for what goes on with the block before.

    ``language`` is that of a fenced block, None for all else; the source of such a block is the bare code.
    """

    source: str
    language: str | None = None
    first: bool = True


class GrowingMarkdown:
    """Takes text and gives blocks: :meth:`add` settles those that no later text can change; the rest is the tail."""

    def __init__(self) -> None:
        self._tail = ""
        self._code: str | None = None  # the fence that an open listing, settled in part, was opened with
        self._language: str | None = None
        self._piece = False  # the tail goes on with a block that was settled in part

    def add(self, text: str) -> list[Block]:
        """Append ``text``; returns the blocks that are settled by it."""
        self._tail += text
        settled: list[Block] = []
        if "\n" in text:
            while piece := self._settle():
                settled += piece
        return settled

    def tail(self) -> list[Block]:
        """What is not settled, as blocks."""
        if self._code is not None:
            code, closed, rest = _cut_fence(self._tail, self._code)
            blocks = [Block(code, self._language, first=False)] if code else []
            return blocks + (split_blocks(rest) if closed else [])
        blocks = split_blocks(self._tail)
        if blocks and self._piece:
            blocks[0] = Block(blocks[0].source, blocks[0].language, first=False)
        return blocks

    def _settle(self) -> list[Block]:
        if self._code is not None:
            return self._settle_code(self._code)
        starts = _starts(self._tail, 0)
        lines = self._tail.split("\n")
        if len(starts) > 1:
            cut = starts[-1]
        elif len(lines) <= LONGEST_TAIL:
            return []
        elif opened := _FENCE.match(self._tail.lstrip("\n")):
            self._code, self._language = opened.group(1), opened.group(2)
            first = not self._piece
            self._tail, self._piece = self._tail.lstrip("\n")[opened.end() :], False
            settled = self._settle_code(self._code)
            return [Block(block.source, block.language, first=first and not n) for n, block in enumerate(settled)]
        else:
            items = _starts(self._tail, 1)
            if len(items) < 2:
                return []
            cut = items[-1]
        settled = split_blocks("\n".join(lines[:cut]))
        if settled and self._piece:
            settled[0] = Block(settled[0].source, settled[0].language, first=False)
        self._piece = len(starts) == 1
        self._tail = "\n".join(lines[cut:])
        return settled

    def _settle_code(self, fence: str) -> list[Block]:
        code, closed, rest = _cut_fence(self._tail, fence)
        if closed:
            self._code, self._tail, self._piece = None, rest, False
            return [Block(code, self._language, first=False)] if code else []
        lines = self._tail.split("\n")
        if len(lines) <= LONGEST_TAIL:
            return []
        self._tail = "\n".join(lines[LONGEST_TAIL - 1 :])
        return [Block("\n".join(lines[: LONGEST_TAIL - 1]), self._language, first=False)]


def split_blocks(source: str) -> list[Block]:
    """The top-level blocks of ``source``, in order, all of it."""
    starts = _starts(source, 0)
    if not starts:
        return []
    lines = source.split("\n")
    blocks = []
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        text = "\n".join(lines[start:end]).rstrip("\n")
        opened = _FENCE.match(text + "\n")
        if opened:
            code, _, _ = _cut_fence((text + "\n")[opened.end() :], opened.group(1))
            blocks.append(Block(code.removesuffix("\n"), opened.group(2)))
        elif text.strip():
            blocks.append(Block(text))
    return blocks


def cut_listings(blocks: list[Block], longest: int = 200) -> list[Block]:
    """``blocks`` with very long listings in pieces, so that none takes long to render."""
    cut = []
    for block in blocks:
        lines = block.source.split("\n") if block.language is not None else []
        if len(lines) <= longest:
            cut.append(block)
            continue
        for start in range(0, len(lines), longest):
            piece = "\n".join(lines[start : start + longest])
            cut.append(Block(piece, block.language, first=block.first and start == 0))
    return cut


def _cut_fence(text: str, fence: str) -> tuple[str, bool, str]:
    """(code, whether the fence is closed in ``text``, what follows it)."""
    closing = re.search(rf"^ {{0,3}}{re.escape(fence[0])}{{{len(fence)},}}[ \t]*$", text, re.MULTILINE)
    if closing is None:
        return text, False, ""
    return text[: closing.start()].removesuffix("\n"), True, text[closing.end() :].removeprefix("\n")


def _starts(source: str, level: int) -> list[int]:
    """Line numbers at which blocks of this depth begin."""
    found: list[int] = []
    for token in Markdown(source).parsed:
        if token.map is not None and token.level == level and token.nesting >= 0 and token.type != "inline":
            found.append(token.map[0])
    return found

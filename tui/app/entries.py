"""What a chat shows, one after the other: questions, answers, notes. Each knows its lines at a width."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator

from rich.style import Style

from tui.app.blocks import Block, GrowingMarkdown, cut_listings, split_blocks
from tui.app.render import Line, Renderer

_THINK = re.compile(r"\s*<think>")
_THOUGHT = re.compile(r"</think>\s*")


class Entry(ABC):
    """``lines`` are as of the latest rendering; ``dirty`` says that this is another width or look ago."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.dirty = True

    @abstractmethod
    def steps(self, renderer: Renderer) -> Iterator[None]:
        """Make ``lines`` anew, a little at each step; the old ones stay until the last."""

    def render(self, renderer: Renderer) -> None:
        """All steps at once."""
        for _ in self.steps(renderer):
            pass


class Question(Entry):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def steps(self, renderer: Renderer) -> Iterator[None]:
        style = renderer.look.base + renderer.look.accent + Style(bold=True)
        self.lines = [renderer.blank(), *renderer.text(self.text, style, prefix="› ")]
        self.dirty = False
        yield


class Note(Entry):
    """A line of the program's own. ``kind``: "dim", "warm" or "bad"."""

    def __init__(self, text: str, kind: str = "dim") -> None:
        super().__init__()
        self.text = text
        self.kind = kind

    def steps(self, renderer: Renderer) -> Iterator[None]:
        style = renderer.look.named(self.kind)
        self.lines = [renderer.blank(), *renderer.text(self.text, style, prefix="  " if self.kind == "dim" else "! ")]
        self.dirty = False
        yield


class Document(Entry):
    """Markdown of the program's own: help, statistics, a plan."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source

    def steps(self, renderer: Renderer) -> Iterator[None]:
        self.lines = [line for block in split_blocks(self.source) for line in renderer.block(block, -1)]
        self.dirty = False
        yield


class Answer(Entry):
    """An answer that may still grow. Reasoning (``<think>``) is folded to one line unless ``unfolded``."""

    def __init__(self, text: str = "", status: str = "") -> None:
        super().__init__()
        self.text = ""
        self.status = status
        self.status_kind = "dim"
        self.unfolded = False
        self.done = False
        self.waiting = ""
        self._growing = GrowingMarkdown()
        self._settled: list[Line] = []
        self._blocks: list[Block] = []
        self._all: list[Block] = []  # the unsettled ones included
        self._thinking: str | None = None
        self._thinks_still = False
        self._held = ""  # the beginning, while it may become <think>
        if text:
            self.finish(text, status)

    @property
    def thinks(self) -> bool:
        """Whether it begins with reasoning."""
        return self._thinking is not None

    @property
    def thought(self) -> str:
        """The reasoning so far."""
        return (self._thinking or "").strip()

    @property
    def reply(self) -> str:
        """The text without its reasoning."""
        if not _THINK.match(self.text):
            return self.text
        return _THOUGHT.split(self.text, maxsplit=1)[1] if _THOUGHT.search(self.text) else ""

    def code(self, number: int) -> str:
        """The listing that block ``number`` is, or is a piece of."""
        first = number
        while first > 0 and not self._all[first].first:
            first -= 1
        parts = [self._all[first].source]
        for block in self._all[first + 1 :]:
            if block.first or block.language is None:
                break
            parts.append(block.source)
        return "\n".join(parts)

    def last_code(self) -> str | None:
        """The last listing, if there is one."""
        numbers = [number for number, block in enumerate(self._all) if block.language is not None]
        return self.code(numbers[-1]) if numbers else None

    def add(self, text: str, renderer: Renderer) -> None:
        """Some more of the answer came; renders what it changes."""
        self.text += text
        self._take(text, renderer)
        self._render_tail(renderer)

    def finish(self, text: str, status: str, kind: str = "dim") -> None:
        """The answer is complete: it is rendered as a whole the next time."""
        self.text, self.status, self.status_kind = text, status, kind
        self.done, self.waiting, self.dirty = True, "", True

    def steps(self, renderer: Renderer) -> Iterator[None]:
        if not self.done:
            text, self.text = self.text, ""
            self._start()
            self.add(text, renderer)
            self.dirty = False
            return
        thinking, blocks = self._split_whole()
        settled: list[Line] = []
        for number, block in enumerate(blocks):
            settled += renderer.block(block, number)
            yield
        self._start()
        self._thinking, self._blocks, self._settled = thinking, blocks, settled
        self._render_tail(renderer)
        self.dirty = False

    def _start(self) -> None:
        self._growing = GrowingMarkdown()
        self._settled, self._blocks, self._all = [], [], []
        self._thinking = None
        self._thinks_still = False
        self._held = ""

    def _split_whole(self) -> tuple[str | None, list[Block]]:
        """The reasoning, if there is any, and the blocks of the reply."""
        if not _THINK.match(self.text):
            return None, cut_listings(split_blocks(self.text))
        body = _THINK.sub("", self.text, count=1)
        thinking, *reply = _THOUGHT.split(body, maxsplit=1)
        return thinking, cut_listings(split_blocks(reply[0])) if reply else []

    def _take(self, text: str, renderer: Renderer) -> None:
        if self._thinking is None and not self._blocks and not self._thinks_still and len(self._held) < 8:
            text, self._held = self._held + text, ""
            if _THINK.match(text):
                self._thinking, self._thinks_still = "", True
                text = _THINK.sub("", text, count=1)
            elif "<think>".startswith(text.strip()):
                self._held = text
                return
            else:
                self._held = " " * 8  # decided
        if self._thinks_still:
            self._thinking = (self._thinking or "") + text
            if not (ended := _THOUGHT.search(self._thinking)):
                return
            text = self._thinking[ended.end() :]
            self._thinking, self._thinks_still = self._thinking[: ended.start()], False
        for block in self._growing.add(text):
            self._settled += renderer.block(block, len(self._blocks))
            self._blocks.append(block)

    def _render_tail(self, renderer: Renderer) -> None:
        head: list[Line] = []
        if self._thinking is not None and self.thought:
            words = len(self.thought.split())
            arrow = "▾" if self.unfolded else "▸"
            verb = "thinking" if self._thinks_still and not self.done else "thought"
            style = renderer.look.dim
            head = [renderer.blank(), *renderer.text(f"{arrow} {verb}, {words} words", style, act="think")]
            if self.unfolded:
                head += renderer.text(self.thought, style + Style(italic=True), prefix="  ")
        tail: list[Line] = []
        pending = [] if self.done else self._growing.tail()
        for number, block in enumerate(pending, len(self._blocks)):
            tail += renderer.block(block, number)
        self._all = self._blocks + pending
        if self.waiting and not self.text:
            tail += [renderer.blank(), *renderer.text(self.waiting, renderer.look.dim)]
        if self.status:
            tail += [renderer.blank(), *renderer.text(self.status, renderer.look.named(self.status_kind))]
        self.lines = [*head, *self._settled, *tail]

"""What a chat shows, one after the other: questions, answers, notes. Each knows its lines at a width."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from rich.style import Style

from tui.app.blocks import Block, GrowingMarkdown, cut_listings, split_blocks
from tui.app.render import Line, Renderer


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
    """An answer that may still grow. Its reasoning is folded to one line unless ``unfolded``."""

    def __init__(self, text: str = "", status: str = "", reasoning: str = "") -> None:
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
        self._thinking = ""
        if text or reasoning:
            self.finish(text, status, reasoning=reasoning)

    @property
    def thinks(self) -> bool:
        """Whether there is reasoning."""
        return bool(self.thought)

    @property
    def thought(self) -> str:
        """The reasoning so far."""
        return self._thinking.strip()

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

    def think(self, text: str) -> None:
        """Some more of its reasoning came; :meth:`add` renders it."""
        self._thinking += text

    def add(self, text: str, renderer: Renderer) -> None:
        """Some more of the answer came; renders what it changes."""
        self.text += text
        for block in self._growing.add(text):
            self._settled += renderer.block(block, len(self._blocks))
            self._blocks.append(block)
        self._render_tail(renderer)

    def finish(self, text: str, status: str, kind: str = "dim", reasoning: str = "") -> None:
        """The answer is complete: it is rendered as a whole the next time."""
        self.text, self.status, self.status_kind = text, status, kind
        self._thinking = reasoning or self._thinking
        self.done, self.waiting, self.dirty = True, "", True

    def steps(self, renderer: Renderer) -> Iterator[None]:
        if not self.done:
            text, self.text = self.text, ""
            self._start()
            self.add(text, renderer)
            self.dirty = False
            return
        blocks = cut_listings(split_blocks(self.text))
        settled: list[Line] = []
        for number, block in enumerate(blocks):
            settled += renderer.block(block, number)
            yield
        self._start()
        self._blocks, self._settled = blocks, settled
        self._render_tail(renderer)
        self.dirty = False

    def _start(self) -> None:
        self._growing = GrowingMarkdown()
        self._settled, self._blocks, self._all = [], [], []

    def _render_tail(self, renderer: Renderer) -> None:
        head: list[Line] = []
        if self.thinks:
            words = len(self.thought.split())
            arrow = "▾" if self.unfolded else "▸"
            verb = "thought" if self.text or self.done else "thinking"
            style = renderer.look.dim
            head = [renderer.blank(), *renderer.text(f"{arrow} {verb}, {words} words", style, act="think")]
            if self.unfolded:
                head += renderer.text(self.thought, style + Style(italic=True), prefix="  ")
        tail: list[Line] = []
        pending = [] if self.done else self._growing.tail()
        for number, block in enumerate(pending, len(self._blocks)):
            tail += renderer.block(block, number)
        self._all = self._blocks + pending
        if self.waiting and not self.text and not self.thinks:
            tail += [renderer.blank(), *renderer.text(self.waiting, renderer.look.dim)]
        if self.status:
            tail += [renderer.blank(), *renderer.text(self.status, renderer.look.named(self.status_kind))]
        self.lines = [*head, *self._settled, *tail]

"""What is seen while a model is opened: the plan, every step with its progress, how to give it up, and a prompt."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import TextArea

from offload.config import format_size
from offload.events import LoadProgress, Notice, Planned
from tui.app.look import Look
from tui.app.panel_box import LineBox
from tui.app.prompt_box import PromptBox
from tui.panel import Line, bar

_BAR = 24
_LABEL = 26


@dataclass(slots=True)
class Stage:
    """A step: what is done of it, and of that what was done before (``first``); since when, and until when."""

    first: int
    done: int
    total: int
    unit: str
    began: float
    now: float

    @property
    def complete(self) -> bool:
        return 0 < self.total <= self.done

    def rate(self) -> float | None:
        """What is done in a second; None until there is something to go by."""
        passed, new = self.now - self.began, self.done - self.first
        return new / passed if passed >= 1 and new > 0 else None

    def remaining(self) -> float | None:
        """Seconds, if the rate so far goes on."""
        rate = self.rate()
        if self.complete or not rate or not self.total:
            return None
        return (self.total - self.done) / rate


class LoadScreen(ModalScreen[None]):
    """Fed with :meth:`tell`; goes away when the app pops it. Escape cancels, or closes it after a failure.

    What is typed meanwhile goes into ``prompt``; ``ready`` says that it was sent, and shall be when the model is there.
    """

    DEFAULT_CSS = """
    LoadScreen { align: center middle; }
    LoadScreen > VerticalScroll { width: 92%; max-width: 100; height: auto; max-height: 75%; border: round $primary;
        padding: 0 2; background: $background; }
    LoadScreen > PromptBox { width: 92%; max-width: 100; max-height: 5; }
    """
    BINDINGS = [  # noqa: RUF012 - as Textual wants it
        Binding("escape,ctrl+c", "give_up", "cancel", priority=True)
    ]
    AUTO_FOCUS = "PromptBox"

    def __init__(
        self, model: str, look: Look, prompt: PromptBox, cancel: Callable[[], None], leave: Callable[[], None]
    ) -> None:
        super().__init__()
        self.prompt = prompt
        self.ready = False
        self._model = model
        self._look = look
        self._cancel = cancel
        self._leave = leave
        self._plan: Planned | None = None
        self._notices: list[str] = []
        self._stages: dict[str, Stage] = {}
        self._problem: str | None = None
        self._cancelling = False
        self._began = time.monotonic()

    def compose(self) -> ComposeResult:
        with VerticalScroll():
            yield LineBox(self._look, id="loading")
        yield self.prompt

    def on_mount(self) -> None:
        self.prompt.placeholder = "type a question meanwhile"
        self.prompt.move_cursor(self.prompt.document.end)
        self.set_interval(0.2, self.repaint)
        self.call_after_refresh(self.repaint)

    def tell(self, event: LoadProgress | Notice | Planned) -> None:
        """Take an event in; the next repaint shows it."""
        now = time.monotonic()
        if isinstance(event, Planned):
            self._plan = event
        elif isinstance(event, Notice):
            self._notices.append(event.text)
        else:
            stage = self._stages.setdefault(event.stage, Stage(event.done, 0, 0, event.unit, now, now))
            stage.done, stage.total, stage.now = event.done, event.total, now

    def fail(self, problem: str) -> None:
        """It did not work; the screen stays until it is closed."""
        self._problem = problem
        self.prompt.placeholder = ""
        self.repaint()

    def action_give_up(self) -> None:
        if self._problem is not None:
            self._leave()
        else:
            self._cancelling = True
            self._cancel()
            self.repaint()

    @on(PromptBox.Sent)
    def _sent(self, event: PromptBox.Sent) -> None:
        event.stop()
        self.ready = self._problem is None and not self._cancelling
        self.prompt.border_subtitle = "sent as soon as the model is there" if self.ready else "no model to send it to"

    @on(TextArea.Changed)
    def _typed(self) -> None:
        self.ready = False
        self.prompt.border_subtitle = ""

    def repaint(self) -> None:
        for box in self.query("#loading").results(LineBox):  # none while the screen comes or goes
            box.show(self.lines(max(20, box.content_size.width)))

    def lines(self, width: int) -> list[Line]:
        """What it shows, ``width`` columns wide."""
        lines: list[Line] = [[(f"Loading {self._model}", "title")], []]
        for notice in self._notices:
            lines += [[(part, "dim")] for part in wrap(notice, width)]
        if self._plan is not None:
            lines += [[], [("Plan", "title")]]
            lines += [[(part, "")] for text in self._plan.summary for part in wrap(text, width)]
            for what, size, remark in self._plan.rows:
                text = f"{what:<14}{format_size(size):>10}  "
                lines.append([(text, ""), (remark[: max(0, width - len(text))], "dim")])
        if self._stages:
            lines += [[], [("Steps", "title")]]
            lines += [stage_line(name, stage, width) for name, stage in self._stages.items()]
        elif self._problem is None:
            lines += [[], [(f"starting, {time.monotonic() - self._began:.0f} s", "dim")]]
        lines.append([])
        if self._problem is not None:
            lines += [[(part, "bad")] for part in wrap(self._problem, width)]
            lines.append([("Esc goes back; /models or F6 chooses another model", "dim")])
        else:
            lines.append([("stopping at the next step ..." if self._cancelling else "Esc cancels", "dim")])
        return lines


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` columns."""
    import textwrap

    return textwrap.wrap(text, max(10, width)) or [""]


def stage_line(name: str, stage: Stage, width: int) -> Line:
    """A step with a bar, how far it is, and how long it will take."""
    show = format_size if stage.unit == "bytes" else str
    share = stage.done / stage.total if stage.total else 0.0
    text = f"{show(stage.done)} of {show(stage.total)}" if stage.total else show(stage.done)
    if stage.unit == "bytes" and not stage.complete and (rate := stage.rate()) is not None:
        text += f", {format_size(rate)}/s"
    if (left := stage.remaining()) is not None:
        text += f", {left:.0f} s left"
    mark = "✓ " if stage.complete else "  "
    room = min(_BAR, max(6, width - _LABEL - 30))
    style = "good" if stage.complete else "warm"
    return [(f"{mark}{name[: _LABEL - 3]:<{_LABEL - 2}}", ""), (bar(share, room), style), (f"  {text}", "dim")]

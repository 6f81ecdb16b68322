"""What is seen of ``/tune``: the replays with their progress, then what they found, to be applied and kept."""

from __future__ import annotations

from collections.abc import Callable

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Static

from offload.errors import RunLocalError
from offload.events import LiveChanges, LoadProgress
from offload.protocol import TuneJob, TuneReport
from tui.app.entries import Document
from tui.app.load_screen import Stage, stage_line, wrap
from tui.app.look import Look
from tui.app.panel_box import LineBox
from tui.app.screens import BOX, LineScreen
from tui.app.transcript import Transcript
from tui.tune_view import live_report

_RUNNING = "Answers go on meanwhile, a little slower · Esc gives it up"


class TuneScreen(ModalScreen[None]):
    """Fed with :meth:`tell`, :meth:`show` and :meth:`fail`. ``cancel`` is called if it is closed before the end;
    ``save`` keeps a report as a preset of that name and returns what to say of it, or raises RunLocalError."""

    DEFAULT_CSS = f"TuneScreen {{ {BOX} & #report {{ display: none; }} & #steps {{ margin: 1 1; }} }}"
    BINDINGS = [  # noqa: RUF012 - as Textual wants it
        Binding("escape,ctrl+c,q", "close", "close"),
        Binding("enter", "apply", "apply"),
        Binding("s", "save", "save"),
    ]

    def __init__(
        self,
        job: TuneJob,
        look: Look,
        cancel: Callable[[], None],
        apply: Callable[[LiveChanges], None],
        save: Callable[[TuneReport, str], str],
    ) -> None:
        super().__init__()
        self.job = job
        self.report: TuneReport | None = None
        self._look = look
        self._cancel = cancel
        self._apply = apply
        self._save = save
        self._stage: Stage | None = None
        self._problem: str | None = None

    def compose(self) -> ComposeResult:
        with Vertical() as box:
            box.border_title = "tune: which policy suits this talk"
            yield LineBox(self._look, id="steps")
            yield Transcript(self._look, id="report")
            yield Static(_RUNNING, id="hint", markup=False)

    def on_mount(self) -> None:
        self.call_after_refresh(self._repaint)

    def tell(self, event: LoadProgress, now: float) -> None:
        """Some of the replays are done, at the time ``now``."""
        if self._stage is None:
            self._stage = Stage(0, 0, 0, event.unit, now, now)
        self._stage.done, self._stage.total, self._stage.now = event.done, event.total, now
        self._repaint()

    def show(self, report: TuneReport) -> None:
        """All are done."""
        self.report = report
        self._repaint()

    def fail(self, problem: str) -> None:
        """It did not work; the screen stays until it is closed."""
        self._problem = problem
        self._repaint()

    def say(self, text: str) -> None:
        """In the line at the bottom."""
        self.query_one("#hint", Static).update(text)

    def action_close(self) -> None:
        if self.report is None and self._problem is None:
            self._cancel()
        self.dismiss()

    def action_apply(self) -> None:
        if self.report is not None and self._has_advice:
            self._apply(self.report.changes)
            self.dismiss()

    def action_save(self) -> None:
        report = self.report
        if report is None:
            return

        def named(name: str | None) -> None:
            if name is not None:
                try:
                    self.say(self._save(report, name))
                except RunLocalError as error:
                    self.say(str(error))

        self.app.push_screen(LineScreen("a name for the preset"), named)

    @property
    def _has_advice(self) -> bool:
        return self.report is not None and self.report.changes != LiveChanges()

    def _repaint(self) -> None:
        if not self.is_mounted:
            return
        if self.report is not None:
            self._show_report(self.report)
            return
        box = self.query_one("#steps", LineBox)
        width = max(20, box.content_size.width)
        if self._problem is not None:
            box.show([[(part, "bad")] for part in wrap(self._problem, width)])
            self.say("Esc closes")
        elif self._stage is None:
            box.show([[("starting", "dim")]])
        else:
            box.show([stage_line("replaying", self._stage, width)])

    def _show_report(self, report: TuneReport) -> None:
        self.query_one("#steps").display = False
        reading = self.query_one("#report", Transcript)
        if reading.display:
            return
        reading.display = True
        reading.stay()
        # it has its width only after the next layout
        self.call_after_refresh(lambda: reading.add(Document(live_report(report.found, report.notes))))
        reading.focus()
        self.say(f"{'Enter applies it now · ' if self._has_advice else ''}S keeps it as a preset · Esc closes")

"""The full-screen chat: what is on the screen, and how news of the engine's thread gets there."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from textual import events, on
from textual.app import ComposeResult, SystemCommand
from textual.binding import Binding
from textual.containers import Horizontal, Vertical
from textual.geometry import Size
from textual.message import Message
from textual.screen import Screen as TextualScreen
from textual.widgets import Footer

from offload.config import EngineSettings
from offload.errors import RunLocalError
from offload.events import CacheSnapshot, Planned, RunStats
from offload.protocol import EngineHost, LiveEngine
from tui.actions import ACTIONS, BY_NAME, key_name, parse_slash
from tui.app import answering, handlers, loading
from tui.app.clipboard import copy_text
from tui.app.drawer import Drawer
from tui.app.entries import Answer, Note
from tui.app.hangup import HangupWatch
from tui.app.internals import CrashCatcher
from tui.app.look import DARK, LIGHT, Look, make_look, theme_name
from tui.app.map_box import ExpertMap
from tui.app.pace import Pace
from tui.app.panel_box import LineBox
from tui.app.prompt_box import PromptBox, PromptHistory
from tui.app.screens import MapScreen
from tui.app.sidebar import Sidebar
from tui.app.transcript import Transcript
from tui.failures import ExitCode
from tui.figures import Comparison
from tui.session import Session
from tui.settings import LookSettings
from tui.tuner import TuneNews, Tuner
from tui.worker import Answering, EngineWorker, News

WIDE = 110
"""From how many columns on the panel is at the side unless it was hidden."""
TALL = 42
"""From how many lines on the map is below it."""


class ChatApp(CrashCatcher):
    """One conversation with one engine at a time. Its result is the exit code."""

    class NewsCame(Message):
        """Another thread has put something into the queue of news."""

    class HungUp(Message):
        """The terminal is gone."""

    CSS = """
    #main { height: 1fr; }
    #talk { width: 1fr; min-width: 12; }
    #title { height: 1; padding: 0 1; }
    #status { height: 1; padding: 0 2; display: none; }
    Screen { background: $background; }
    """
    TITLE = "run-local"
    ENABLE_COMMAND_PALETTE = True
    BINDINGS = [  # noqa: RUF012 - as Textual wants it
        Binding(
            ",".join(action.keys),
            "command_palette" if action.name == "palette" else f"act('{action.name}')",
            action.footer or action.help,
            show=bool(action.footer),
            priority=True,
            id=action.name,
            key_display=key_name(action.keys[0]),
        )
        for action in ACTIONS
        if action.keys and action.scope == "app"
    ]

    def __init__(
        self,
        host: EngineHost,
        settings: EngineSettings,
        session: Session,
        look: LookSettings | None = None,
        history: Path | None = None,
        copies: Path | None = None,
    ) -> None:
        # told later that there are no colours, Textual would make all of them grey instead
        super().__init__(ansi_color=True if "NO_COLOR" in os.environ else None)
        self.look_settings = look or LookSettings()
        self.host = host
        self.settings = settings
        self.session = session
        self.engine: LiveEngine | None = None
        self.answer: Answer | None = None
        self.stopping = False
        self.begun: RunStats | None = None
        self.comparison: Comparison | None = None
        self.snapshot: CacheSnapshot | None = None
        self.plan: Planned | None = None
        self.tracing = False
        self.last_problem: str | None = None
        self.copies = copies
        self.worker = EngineWorker(host, self._deliver)
        self.tuner = Tuner(self._deliver)
        self.panel_wanted: bool | None = None if self.look_settings.panel else False
        self.history = PromptHistory(history)
        self._news: deque[News | TuneNews] = deque()
        self._pace = Pace()
        self.register_theme(DARK)
        self.register_theme(LIGHT)
        self.set_keymap(dict(self.look_settings.keys))
        self.theme = theme_name(self.look_settings.theme)

    @property
    def look(self) -> Look:
        return make_look(self.theme_variables, self.current_theme)

    @property
    def transcript(self) -> Transcript:
        return self.screen_stack[0].query_one("#transcript", Transcript)

    @property
    def prompt(self) -> PromptBox:
        return self.screen_stack[0].query_one("#prompt", PromptBox)

    @property
    def sidebar(self) -> Sidebar:
        return self.screen_stack[0].query_one("#side", Sidebar)

    @property
    def drawer(self) -> Drawer:
        return self.screen_stack[0].query_one("#drawer", Drawer)

    @property
    def busy(self) -> bool:
        """Whether an answer is on its way."""
        return self.answer is not None

    def compose(self) -> ComposeResult:
        look = self.look
        yield LineBox(look, id="title")
        with Horizontal(id="main"):
            with Vertical(id="talk"):
                yield Transcript(look, id="transcript")
                yield LineBox(look, id="status")
                yield PromptBox(self.history, self.look_settings.keys, id="prompt")
            yield Drawer(look, id="drawer")
            yield Sidebar(look, id="side")
        yield Footer(show_command_palette=False, compact=True)

    def on_mount(self) -> None:
        if not self.is_headless:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):  # or the terminal would stay as it is
                asyncio.get_running_loop().add_signal_handler(number, self.leave, 128 + number)
            HangupWatch(lambda: self._tell(self.HungUp()), 128 + signal.SIGHUP)
        self.theme_changed_signal.subscribe(self, lambda theme: self.restyle())
        self.app_resume_signal.subscribe(self, lambda app: self.refresh())  # after fg the terminal is empty
        self.arrange()
        self.show_title()
        self.prompt.focus()
        answering.rebuild(self)
        loading.open_model(self, self.settings)
        self.set_timer(self._pace.interval, self._tick)

    # news of the engine's thread

    def _deliver(self, news: News | TuneNews) -> None:
        """On another thread. Tokens wait for the next tick; all else is shown at once."""
        self._news.append(news)
        if not isinstance(news, Answering):
            self._tell(self.NewsCame())

    def _tell(self, message: Message) -> None:
        """Post a message, on any thread."""
        with suppress(RuntimeError):  # the app has left
            self.post_message(message)

    @on(NewsCame)
    def _take_news(self) -> None:
        """Show what has arrived."""
        if not self.is_running or not self.screen_stack:
            return
        count = len(self._news)
        answering.take(self, [self._news.popleft() for _ in range(count)])

    def _tick(self) -> None:
        """Show new text, and the figures as often as they are due; then wait longer, the more that costs."""
        if not self.is_running or not self.screen_stack:
            return
        self._take_news()
        if self._pace.figures_due(self.busy):
            self.show_figures()
        self.set_timer(self._pace.next(self.busy), self._tick)

    def show_figures(self) -> None:
        """Ask the engine for its state and paint it."""
        engine = self.engine
        if engine is not None:
            self.snapshot = engine.snapshot()
        self.sidebar.show(self)
        for screen in self.screen_stack:
            if isinstance(screen, MapScreen) and self.snapshot is not None and engine is not None:
                screen.show(self.snapshot, engine.expert_score)
        if self.drawer.display:
            self.drawer.show_effect(self.sidebar.effect_lines)

    # looks

    def arrange(self, size: Size | None = None) -> None:
        """Decide what has room, in a terminal of ``size`` (default: as it is)."""
        width, height = size or self.size
        shown = self.panel_wanted if self.panel_wanted is not None else width >= WIDE
        drawer = self.drawer.display and width < WIDE + 30
        self.sidebar.display = shown and not drawer
        self.sidebar.show_map(height >= TALL and self.look_settings.map)
        self.screen_stack[0].query_one("#status").display = not self.sidebar.display

    def on_resize(self, event: events.Resize) -> None:
        if self.screen_stack[0].query("#side"):
            self.arrange(event.size)  # the app's own size is still the old one
            self.call_after_refresh(self.show_figures)

    def show_title(self) -> None:
        """The line at the top: what is chatted with."""
        parts = [("run-local", "title")]
        if self.engine is not None:
            stats = self.engine.stats()
            parts.append((f"  {self.engine.model_name}", ""))
            parts.append((f"  {stats.format} on {stats.device}", "dim"))
            if self.snapshot is not None:
                now = self.snapshot.current
                parts.append((f"  policy {now.policy}  prefetch {now.prefetch}", "dim"))
        if self.session.title:
            parts.append((f"  · {self.session.title}", "dim"))
        if self.tracing:
            parts.append(("  ● recording", "bad"))
        self.screen_stack[0].query_one("#title", LineBox).show([parts])

    def restyle(self) -> None:
        """The theme has changed."""
        look = self.look
        self.transcript.set_look(look)
        for box in self.screen_stack[0].query(LineBox):
            box.set_look(look)
        for map in self.screen_stack[0].query(ExpertMap):
            map.set_look(look)
        self.show_title()

    # what the user does

    def get_system_commands(self, screen: TextualScreen[Any]) -> Iterable[SystemCommand]:
        for action in ACTIONS:
            if action.scope == "app" and action.name not in ("interrupt", "palette"):
                name = f"{action.name}  {action.usage}".rstrip()
                keys = ", ".join(key_name(key) for key in action.keys)
                text = action.help + (f" ({keys})" if keys else "")
                yield SystemCommand(name, text, lambda name=action.name: self.from_palette(name))

    def from_palette(self, name: str) -> None:
        """An action that needs words is put into the prompt, to be completed there."""
        action = BY_NAME[name]
        if action.needs_argument:
            self.prompt.put(f"/{action.slash} ")
        else:
            self.act(name)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """A screen over the chat has keys of its own; there the app's mean nothing but these."""
        if action in ("act", "command_palette") and len(self.screen_stack) > 1:
            return parameters[:1] in (("quit",), ("suspend",))
        return super().check_action(action, parameters)

    def action_act(self, name: str) -> None:
        self.act(name)

    def act(self, name: str, argument: str = "") -> None:
        """Do one of :data:`tui.actions.ACTIONS`. What goes wrong is said, and the chat goes on."""
        try:
            handlers.HANDLERS[name](self, argument)
        except RunLocalError as error:
            self.say(str(error), "bad")

    @on(PromptBox.Sent)
    def _sent(self, event: PromptBox.Sent) -> None:
        text = event.text.strip("\n")
        try:
            if text.startswith("/") and not text.startswith("//"):
                action, argument = parse_slash(text.strip())
                self.prompt.remember(text)
                self.prompt.clear()
                self.act(action.name, argument)
                return
            answering.ask(self, text.removeprefix("/") if text.startswith("//") else text)
            self.prompt.remember(text)
            self.prompt.clear()
        except RunLocalError as error:
            self.say(str(error), "bad")

    @on(PromptBox.Leave)
    def _leave(self) -> None:
        self.act("quit")

    @on(Transcript.CopyWanted)
    def _copy(self, event: Transcript.CopyWanted) -> None:
        self.copy(event.text, "the code")

    @on(Drawer.Change)
    def _change(self, event: Drawer.Change) -> None:
        self.act(event.name, event.text)

    def copy(self, text: str, what: str) -> None:
        """To the terminal's clipboard, and to a file, since no terminal says whether it took it."""
        file = copy_text(self, text, self.copies)
        self.notify(f"copied {what}" + (f"; also in {file}" if file else ""), timeout=3)

    def say(self, text: str, kind: str = "dim") -> None:
        """A line of the program's own in the chat."""
        self.transcript.add(Note(text, kind))

    # leaving

    @on(HungUp)
    def _hung_up(self) -> None:
        self.leave(128 + signal.SIGHUP)

    def leave(self, code: int = ExitCode.DONE) -> None:
        """Stop what is running and go. The engine is closed after the terminal is restored."""
        self.worker.stop()
        self.worker.cancel_open()
        self.tuner.cancel()
        self.exit(code)

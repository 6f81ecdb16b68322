"""Questions and answers on the screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from offload.errors import UsageError
from offload.events import Done, Event, Notice, PrefillProgress, Token
from tui.app import live, loading, tune
from tui.app.entries import Answer, Entry, Question
from tui.asking import how_stopped, why_cut
from tui.conversation import Turn
from tui.status import figure, percent
from tui.tuner import TuneNews
from tui.worker import AnswerFailed, Answering, Called, Dropped, Loading, News, NotOpened, Opened

if TYPE_CHECKING:
    from tui.app.app import ChatApp


def ask(app: ChatApp, question: str, base: Sequence[Turn] | None = None) -> None:
    """Ask the engine; raises UsageError if it cannot be asked now."""
    if app.engine is None:
        raise UsageError("no model is loaded; /models or F6 chooses one")
    if app.busy:
        raise UsageError("an answer is on its way; Esc stops it")
    kept, sampling = app.session.ask(question, base)
    app.transcript.add(Question(question))
    answer = app.answer = Answer()
    answer.waiting = "…"
    app.stopping = False
    app.transcript.add(answer)
    app.transcript.follow()
    app.worker.ask(app.session.conversation, kept, question, sampling)


def rebuild(app: ChatApp) -> None:
    """Show the conversation as it is."""
    entries: list[Entry] = []
    for turn in app.session.conversation.turns:
        status = "stopped" if turn.finish_reason == "cancelled" else ""
        entries += [Question(turn.question), Answer(turn.answer, status, turn.reasoning)]
    app.transcript.replace(entries)


def take(app: ChatApp, some: Sequence[News | TuneNews]) -> None:
    """Show news; the texts of tokens that arrived together are rendered together."""
    text: list[str] = []
    thoughts: list[str] = []

    def show_text() -> None:
        if (text or thoughts) and app.answer is not None:
            app.answer.think("".join(thoughts))
            app.transcript.extend(app.answer, "".join(text))
        text.clear()
        thoughts.clear()

    for news in some:
        if isinstance(news, Answering) and isinstance(news.event, Token):
            text.append(news.event.text)
            thoughts.append(news.event.reasoning)
            app.session.part(news.event.text, news.event.reasoning)
            continue
        show_text()
        if isinstance(news, Answering):
            _take_event(app, news.event)
        elif isinstance(news, Loading | Opened | NotOpened):
            loading.take(app, news)
        elif isinstance(news, Dropped):
            app.session.forget(news.turns)
            app.notify(news.text)
        elif isinstance(news, AnswerFailed):
            _fail(app, news.problem)
        elif isinstance(news, Called) and news.name == "tune" and news.problem is None:
            tune.begin(app, news.result)
        elif isinstance(news, Called):
            live.take(app, news)
        elif isinstance(news, TuneNews):
            tune.take(app, news)
    show_text()


def _take_event(app: ChatApp, event: Event) -> None:
    answer = app.answer
    if answer is None:
        return
    if isinstance(event, PrefillProgress):
        left = event.total - event.done
        answer.waiting = f"reading the prompt: {event.done} of {event.total} tokens" if left else "…"
        app.transcript.extend(answer, "")
    elif isinstance(event, Notice):
        app.notify(event.text, timeout=10)
    elif isinstance(event, Done):
        became_turn = app.session.end(event)
        app.answer = None
        status, kind = _status(app, event, became_turn)
        answer.finish(event.text, status, kind, event.reasoning)
        app.transcript.finish(answer)
        if not became_turn and event.reason == "error":
            app.say("the conversation is as it was before; /retry or Ctrl+R asks again", "warm")
        app.show_figures()


def _fail(app: ChatApp, problem: str) -> None:
    """An answer that ended without a Done, or never began: the conversation is as before."""
    answer, app.answer = app.answer, None
    app.session.fail()
    if answer is not None:
        answer.finish(answer.text, problem, "bad")
        app.transcript.finish(answer)
    app.show_figures()


def _status(app: ChatApp, done: Done, became_turn: bool) -> tuple[str, str]:
    """The line below an answer, and how it looks."""
    stats = done.stats
    parts = [
        f"{figure(stats.decode_tokens_per_s)} tokens/s{' (simulated)' if stats.virtual else ''}",
        f"first token {figure(stats.ttft_s, ' s', 2)}",
        f"hit rate {percent(stats.experts.hit_rate)}",
        f"{done.new_tokens} tokens",
    ]
    kind = "dim"
    if done.reason == "error":
        problem = done.error or "the generation failed"
        parts = [problem, *parts] if done.new_tokens else [problem]
        kind = "bad"
    elif done.reason == "cancelled":
        parts.insert(0, how_stopped(done, became_turn))
    elif done.reason == "length":
        parts.insert(0, f"cut off: {why_cut(done, app.session.sampling)}")
    return " · ".join(parts), kind

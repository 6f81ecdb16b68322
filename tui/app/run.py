"""Run the full-screen chat: from flags to an exit code, with the terminal as it was before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from offload.config import EngineSettings, SamplingSettings
from offload.errors import RunLocalError
from offload.protocol import EngineHost
from tui.app.app import ChatApp
from tui.failures import ExitCode, say
from tui.folders import state_folder
from tui.session import Session
from tui.settings import config_file, read_look
from tui.store import Store, conversations_folder


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What the flags of ``chat`` ask for. ``resume`` is the file of a conversation to go on with."""

    settings: EngineSettings
    sampling: SamplingSettings
    system: str | None = None
    resume: Path | None = None


def run_app(host: EngineHost, request: ChatRequest) -> int:
    """Chat until the user leaves; returns the exit code. Raises what went wrong after the terminal is restored."""
    look = read_look(config_file())
    folder, state = conversations_folder(), state_folder()
    session = Session(Store(folder) if folder else None, request.sampling, request.system)
    if request.resume is not None:
        session.resume(request.resume)
        if request.system:
            session.set_system(request.system)
    app = ChatApp(
        host,
        request.settings,
        session,
        look,
        history=state / "messages" if state else None,
        copies=state / "copied.txt" if state else None,
    )
    session.on_problem = lambda problem: app.say(problem, "bad")
    try:
        code = app.run()
    finally:
        app.tuner.close()
        app.worker.close()
        session.close()
    if app.crash is not None:
        if session.conversation.turns:
            say("the conversation is saved; go on with it with run-local chat --continue")
        raise app.crash
    if app.worker.close_problem is not None:
        raise RunLocalError(app.worker.close_problem)
    if app.last_problem is not None and not code:
        raise RunLocalError(app.last_problem)
    return ExitCode.FAILED if code is None else code

"""One setting in a process of its own: started, listened to, and ended whatever happens. Standard library only."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO, Any

from offload.errors import RunLocalError

_ERROR = "run-local: error: "
_PATIENCE_S = 5.0
_WAKE_S = 0.2


def run_child(
    name: str, command: Sequence[str], on_line: Callable[[str], None], keep: Sequence[int] = ()
) -> dict[str, Any]:
    """Run ``command`` and return the JSON object that it prints. ``keep``: file descriptors that it inherits.

    Lines that it writes on stderr go to ``on_line`` as they come (from another thread). Whatever ends this call
    early, Ctrl-C included, ends the process too; it holds nothing that a sudden end would spoil.

    Raises RunLocalError, naming the setting ``name``, if the process fails.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            pass_fds=tuple(keep),
        )
    except OSError as error:
        raise RunLocalError(f"setting '{name}': {command[0]} cannot be started ({error.strerror})") from error
    assert process.stdout is not None and process.stderr is not None
    output: list[str] = []
    errors = _Errors(on_line)
    listeners = [_Listener(process.stdout, output.append), _Listener(process.stderr, errors)]
    try:
        for listener in listeners:
            listener.start()
        for listener in listeners:
            while listener.is_alive():  # wakes up, so that a Ctrl-C that comes just before the wait is noticed too
                listener.join(_WAKE_S)
        code = process.wait()
    finally:
        _end(process)
        for listener in listeners:
            listener.finish()
    if code != 0:
        raise RunLocalError(f"setting '{name}': {errors.last or _how_it_ended(code)}")
    try:
        result = json.loads("".join(output))
    except ValueError:
        result = None
    if not isinstance(result, dict):
        raise RunLocalError(f"setting '{name}': its process printed no result")
    return result


class _Errors:
    """Keeps the last error that the program itself reported; passes other lines on."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self.last: str | None = None
        self._on_line = on_line

    def __call__(self, line: str) -> None:
        text = line.strip()
        if text.startswith(_ERROR):
            self.last = text.removeprefix(_ERROR)
        elif text:
            with suppress(OSError):  # our own stderr may be closed, and the child must not block on its pipe
                self._on_line(text)


class _Listener(threading.Thread):
    """Reads a stream to its end, line by line."""

    def __init__(self, stream: IO[str], on_line: Callable[[str], None]) -> None:
        super().__init__(name="bench-child", daemon=True)
        self._stream = stream
        self._on_line = on_line

    def run(self) -> None:
        for line in self._stream:
            self._on_line(line)

    def finish(self) -> None:
        """Wait for the end of the stream, which comes with that of the process, and close it."""
        if self.ident is not None:
            self.join()
        self._stream.close()


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _how_it_ended(code: int) -> str:
    if code == 130:
        return "it was interrupted"
    if code == -signal.SIGKILL:
        return "its process was killed, most likely for want of memory"
    if code < 0:
        return f"its process was ended by signal {-code}"
    return f"its process ended with exit code {code}"

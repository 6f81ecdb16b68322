"""All contact with what Textual does not promise to keep. ``tests/tui/test_internals.py`` fails when it goes."""

from __future__ import annotations

from typing import Any

from textual.app import App

from tui.failures import ExitCode


class CrashCatcher(App[int]):
    """An app whose bugs end in ``crash``, to be reported when the terminal is restored."""

    crash: BaseException | None = None

    def _handle_exception(self, error: Exception) -> None:
        """Textual would print a long traceback, with the values of all variables. There is no public way to be told."""
        if self.crash is None:
            self.crash = error
        if self.is_headless:
            super()._handle_exception(error)
        else:
            self.exit(ExitCode.FAILED)


def write_to_terminal(app: App[Any], sequence: str) -> None:
    """Send a control sequence in order with what is painted. Nothing happens while there is no terminal."""
    if (driver := app._driver) is not None:
        driver.write(sequence)

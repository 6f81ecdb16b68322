"""The user's own editor for a message."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from pathlib import Path

from offload.errors import RunLocalError


def edit_text(text: str) -> str:
    """Let ``$VISUAL``, ``$EDITOR`` or vi edit ``text``. Raises RunLocalError if it cannot be started or fails."""
    command = shlex.split(os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi")
    with tempfile.TemporaryDirectory(prefix="run-local-") as folder:
        file = Path(folder) / "message.md"
        file.write_text(text, "utf-8", "replace")
        try:
            code = subprocess.run([*command, str(file)], check=False).returncode
        except OSError as error:
            raise RunLocalError(f"the editor '{command[0]}' cannot be started ({error.strerror}); set EDITOR") from None
        if code != 0:
            raise RunLocalError(f"the editor '{command[0]}' ended with code {code}; the message is as it was")
        return file.read_text("utf-8", "replace").removesuffix("\n")

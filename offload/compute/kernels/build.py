"""Compiles the C sources beside this file for this machine's processor, once, into the cache folder."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from offload.paths import cache_folder

_NAMES = (
    "products.c", "wide.c", "encode.c", "layers.c", "attention.c", "published.c", "packed.c",
    "by_inputs.c", "pool.c",
    "common.h", "weights.h", "by_inputs.h", "pool.h",
)  # fmt: skip
SOURCES = tuple(Path(__file__).with_name(name) for name in _NAMES)
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
_NATIVE = ("-march=native", "-mprefer-vector-width=512")  # what a compiler does not know of these is left out
_SECONDS = 120


class BuildError(Exception):
    """There is no compiler, or it failed; the message is one line."""


def build() -> Path:
    """Path of the compiled library; compiles it if this source, compiler and processor have none yet.

    Raises BuildError.
    """
    compiler = find_compiler()
    sources = [source.read_text("utf-8") for source in SOURCES]
    key = "\0".join((*sources, _version(compiler), _processor(), *_FLAGS, *_NATIVE))
    folder = cache_folder() / "kernels"
    library = folder / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _compile(compiler, library)
        except OSError as error:
            raise BuildError(f"{folder}: cannot be written ({error.strerror})") from error
    return library


def find_compiler() -> list[str]:
    """The C compiler as the start of a command: ``CC``, or the first of cc, gcc and clang. Raises BuildError."""
    chosen = os.environ.get("CC", "").strip()
    if chosen:
        try:
            return shlex.split(chosen)
        except ValueError as error:
            raise BuildError(f'CC: "{chosen}" is no command ({error})') from error
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise BuildError("no C compiler was found (cc, gcc or clang, or the one that CC names)")


def _compile(compiler: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        output = Path(scratch, "kernels.so")
        sources = [str(source) for source in SOURCES if source.suffix == ".c"]
        message = ""
        for native in (_NATIVE, _NATIVE[:1], ("-mcpu=native",), ()):
            command = [*compiler, *_FLAGS, *native, "-shared", "-o", str(output), *sources, "-lm"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise BuildError(f"'{shlex.join(compiler)}' cannot be run ({error})") from error
            if done.returncode == 0 and output.exists():
                os.replace(output, library)
                return
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            first = lines[0] if lines else "it says nothing"
            message = message or next((line for line in lines if "error" in line), first)
        raise BuildError(f"'{shlex.join(compiler)}' failed: {message[:200]}")


def _version(compiler: list[str]) -> str:
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"'{shlex.join(compiler)}' cannot be run ({error})") from error
    return done.stdout


def _processor() -> str:
    """What ``-march=native`` depends on; a cache folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {flags}"

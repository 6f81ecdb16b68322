"""Which packages are installed, against what this project declares."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from offload.events import Finding

_OPTIONAL = {
    "gguf": "GGUF files",
    "sentencepiece": "a tokenizer.model without tokenizer.json",
    "mistral-common": "the chat template of a tekken.json",
}
_SHOWN = ("torch", "transformers")


def packages() -> list[Finding]:
    """Problems with what must be there, and what is optional and missing."""
    try:
        declared = [Requirement(text) for text in requires("run-local") or ()]
    except PackageNotFoundError:
        return [
            Finding(
                "packages",
                "problem",
                "run-local itself is not installed",
                "run make install in its folder, or pip install the folder",
            )
        ]
    found = [
        finding
        for one in declared
        if one.marker is None or one.marker.evaluate({"extra": ""})
        if (finding := check(one)) is not None
    ]
    if not found:
        names = ", ".join(f"{name} {version(name)}" for name in _SHOWN)
        found.append(Finding("packages", "ok", f"Python {platform.python_version()}, {names}"))
    missing = [f"{name} (for {use})" for name, use in _OPTIONAL.items() if _version(name) is None]
    if missing:
        found.append(Finding("packages", "ok", f"optional, not installed: {', '.join(missing)}"))
    return found


def check(wanted: Requirement) -> Finding | None:
    """A problem, unless the package that is ``wanted`` is installed in a version that will do."""
    have = _version(wanted.name)
    if have is not None and wanted.specifier.contains(have, prereleases=True):
        return None
    what = "is not installed" if have is None else f"is installed as {have}, which will not do"
    specifier = ",".join(sorted(str(one) for one in wanted.specifier))
    return Finding(
        "packages", "problem", f"{wanted.name} {what}; wanted: {specifier}", f"pip install '{wanted.name}{specifier}'"
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

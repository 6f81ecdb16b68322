"""The rules of the tree, checked on the sources: who may import whom, how long a module may be, what must not be named.

Sources are parsed and never imported, so a lazy import inside a function counts as much as one at the top.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("cache", "offload", "tui")
MAX_LINES = 450
# The files that may touch what transformers does not promise to keep.
PRIVATE_API_FILES = (Path("offload/model/transformers_api.py"), Path("offload/model/transformers_weights.py"))
PRIVATE_MODULES = ("integrations", "core_model_loading", "conversion_mapping", "modeling_utils")
TUI_MAY_USE = ("offload.events", "offload.config", "offload.protocol", "offload.errors")
# Import name -> distribution, where the two differ.
DISTRIBUTIONS = {"huggingface_hub": "huggingface-hub", "mistral_common": "mistral-common"}


def sources(*tops: str) -> list[Path]:
    """Python files below the given folders, and ``run_local.py``, relative to the root."""
    found = [path.relative_to(ROOT) for top in tops for path in (ROOT / top).rglob("*.py")]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def imports(path: Path) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """(line, absolute module, names taken from it) of every import statement in a file, lazy ones included."""
    return imports_of((ROOT / path).read_text(encoding="utf-8"), path)


def imports_of(text: str, path: Path) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    for node in ast.walk(ast.parse(text, filename=str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            package = path.with_suffix("").parts[: -node.level] if node.level else ()
            module = ".".join((*package, *((node.module,) if node.module else ())))
            yield node.lineno, module, tuple(alias.name for alias in node.names)


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def top(module: str) -> str:
    return module.split(".")[0]


def is_standard(module: str) -> bool:
    return top(module) in sys.stdlib_module_names


def private_names(module: str, names: tuple[str, ...]) -> list[str]:
    """The parts of an import from transformers that are private."""
    if top(module) != "transformers":
        return []
    parts = module.split(".")[1:]
    found = [part for part in parts if part.startswith("_") or part in PRIVATE_MODULES]
    return found + [name for name in names if name.startswith("_") or (not parts and name in PRIVATE_MODULES)]


def broken_imports(path: Path, lines: Iterator[tuple[int, str, tuple[str, ...]]]) -> Iterator[str]:
    """What is wrong with the imports of one source file, one line for each."""
    package = path.parts[0]
    for line, module, names in lines:
        where = f"{path}:{line}: {module}"
        # "from offload import engine" names the module offload.engine.
        full = tuple(f"{module}.{name}" for name in names) or (module,)
        if package == "cache" and not (is_standard(module) or within(module, ("cache", "numpy"))):
            yield f"{where}: cache takes the standard library and numpy only"
        if package == "offload" and top(module) in ("tui", "run_local"):
            yield f"{where}: offload must not know the front ends"
        if package == "tui" and not (is_standard(module) or within(module, ("tui", "rich", "textual"))):
            allowed = within(module, TUI_MAY_USE) or (module == "offload" and all(within(f, TUI_MAY_USE) for f in full))
            if not allowed:
                yield f"{where}: tui takes {', '.join(TUI_MAY_USE)} only"
        if path not in PRIVATE_API_FILES and (found := private_names(module, names)):
            yield f"{where}: private part of transformers ({', '.join(found)}); only {PRIVATE_API_FILES[0]} may use it"


@pytest.mark.parametrize("package", PACKAGES)
def test_import_directions(package: str) -> None:
    broken = [line for path in sources(package) for line in broken_imports(path, imports(path))]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("cache/a.py", "import torch"),
        ("cache/a.py", "def f():\n    from offload.config import parse_size"),
        ("cache/policies/a.py", "from ... import offload"),
        ("offload/a.py", "from tui.plain import Chat"),
        ("offload/memory/a.py", "import run_local"),
        ("tui/a.py", "from offload.engine import Engine"),
        ("tui/a.py", "from offload import engine"),
        ("tui/a.py", "import torch"),
        ("tui/a.py", "import cache.trace"),
        ("offload/a.py", "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS"),
        ("offload/a.py", "from transformers import modeling_utils"),
        ("offload/a.py", "import transformers.core_model_loading"),
        ("offload/a.py", "from transformers.cache_utils import _x"),
    ],
)
def test_the_rules_notice(path: str, text: str) -> None:
    assert list(broken_imports(Path(path), imports_of(text, Path(path))))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("cache/policies/a.py", "import heapq, numpy as np\nfrom .base import Policy\nfrom cache.trace import Trace"),
        ("offload/a.py", "import torch\nfrom cache.expert_cache import ExpertCache"),
        ("offload/a.py", "from transformers import AutoConfig\nfrom transformers.cache_utils import DynamicCache"),
        ("offload/model/transformers_api.py", "from transformers.integrations import moe"),
        ("tui/a.py", "import textual.app\nfrom offload.events import Token\nfrom offload import events\nimport tui.b"),
    ],
)
def test_the_rules_let_pass(path: str, text: str) -> None:
    assert not list(broken_imports(Path(path), imports_of(text, Path(path))))


def test_modules_are_short() -> None:
    lengths = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in all_python()}
    long = {str(path): length for path, length in lengths.items() if length > MAX_LINES}
    assert not long, f"split these (at most {MAX_LINES} lines): {long}"


def test_third_party_imports_are_declared_and_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = project["dependencies"] + [item for items in extras.values() for item in items]
    declared = {re.split(r"[<>=!~\[; ]", item, maxsplit=1)[0] for item in asked} - {"run-local"}
    used = {
        DISTRIBUTIONS.get(top(module), top(module))
        for path in [*sources(*PACKAGES), *command_line()]
        for _, module, _ in imports(path)
        if not is_standard(module) and top(module) not in (*PACKAGES, "run_local", "__future__")
    }
    # Hard requirements of transformers, which hold their own bounds.
    assert used - declared <= {"tokenizers", "jinja2"}, "used and not declared in pyproject.toml"
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    assert not {name for name in declared if f"| {name} |" not in text}, "not explained in docs/dependencies.md"


def test_no_file_names_a_private_path_or_a_package_registry() -> None:
    # Written in parts, so that this file is not found by its own rule.
    paths = r"(?<![\w.$}])/(?:home|work|root|Users)/\w"
    registries = r"https?://[^\s\"')>]*(?:py" + r"pi\.|python" + r"hosted|/sim" + r"ple\b|arti" + r"factory)"
    pattern = re.compile(f"{paths}|{registries}")
    found = []
    for path in text_files():
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def command_line() -> list[Path]:
    return [Path("run_local.py")] if (ROOT / "run_local.py").exists() else []


def all_python() -> list[Path]:
    return [*sources(*PACKAGES, "tests"), *command_line()]


def text_files() -> list[Path]:
    """Everything in the tree that is text: sources, documents, and the files at the top."""
    suffixes = {".py", ".md", ".toml", ".sh", ".json", ".jsonl", ".txt", ".cfg", ".yml", ".in"}
    folders = [path for name in (*PACKAGES, "tests", "docs", ".ci") for path in (ROOT / name).rglob("*")]
    tops = [path for path in ROOT.iterdir() if path.suffix in suffixes or path.name in ("Makefile", "LICENSE")]
    files = [path for path in (*folders, *tops) if path.is_file() and "__pycache__" not in path.parts]
    return sorted(path.relative_to(ROOT) for path in files if path.suffix in suffixes or not path.suffix)

"""The front ends know the engine's protocol and events, nothing else of the project, and never torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {"offload.events", "offload.protocol", "offload.config", "offload.errors"}
FOREIGN = {"offload", "cache", "run_local", "torch", "transformers", "tests", "numpy", "huggingface_hub"}


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: a relative import"
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "tui").rglob("*.py")), ids=lambda path: path.name)
def test_tui_imports_only_the_contracts(path: Path) -> None:
    foreign = {name for name in _imports(path) if name.split(".")[0] in FOREIGN}
    assert foreign <= ALLOWED


def test_batch_and_tui_import_without_torch() -> None:
    modules = [f"tui.{path.stem}" for path in (ROOT / "tui").glob("*.py") if path.stem != "__init__"]
    modules += ["offload.generation.batch", "offload.generation.batch_files"]
    code = (
        f"import sys\nfor name in {modules!r}: __import__(name)\n"
        "print([name for name in ('torch', 'transformers', 'textual', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"

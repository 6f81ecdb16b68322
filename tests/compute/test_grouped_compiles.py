"""The grouped kernels are compiled for every kind of card, down to machine code; no card is needed for that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KIB = 1024
# What a block may have of each card's shared memory: CUDA C++ Programming Guide, technical specifications.
SHARED_BYTES = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 120: 99 * KIB}


def compiled(cache: Path, which: str, *architectures: int) -> list[dict[str, Any]]:
    pytest.importorskip("triton", reason="Triton is not installed; there are no packages of it for this platform")
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "tests.compute.compile_grouped", which, *map(str, architectures)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout))


def check(found: list[dict[str, Any]]) -> None:
    for kernel in found:
        assert kernel["target"].startswith(f"sm_{kernel['architecture']}")
        assert kernel["shared_bytes"] <= SHARED_BYTES[kernel["architecture"]], kernel
        if kernel["kernel"] == "multiply_row":
            assert kernel["wide_loads"] >= 2, f"weights are not read 16 bytes at a time: {kernel}"
        if kernel["kernel"] == "multiply_rows" and "float32" not in kernel["name"]:
            assert kernel["tensor_core_products"] > 0, kernel


def test_for_every_card(tmp_path: Path) -> None:
    found = compiled(tmp_path, "quick", *SHARED_BYTES)
    assert len(found) == 2 * len(SHARED_BYTES)
    check(found)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED_BYTES)
def test_every_format_and_dtype(architecture: int, tmp_path: Path) -> None:
    found = compiled(tmp_path, "all", architecture)
    assert {kernel["kernel"] for kernel in found} == {"multiply_row", "multiply_rows", "combine"}
    check(found)

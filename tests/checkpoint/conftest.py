"""One small checkpoint and its pack, made once; tests that damage them copy them first."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from offload.checkpoint.source import open_source
from tests.checkpoint.packs import tiny_source, write_pack


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixtral checkpoint of several shards. To be read only."""
    folder = tmp_path_factory.mktemp("tiny") / "mixtral"
    return tiny_source("mixtral", folder).folder


@pytest.fixture(scope="session")
def whole_pack(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pack of :func:`checkpoint`. To be read only."""
    folder = tmp_path_factory.mktemp("packs") / "mixtral"
    write_pack(open_source(checkpoint), folder)
    return folder


@pytest.fixture
def packed(whole_pack: Path, tmp_path: Path) -> Path:
    """A copy of the pack that a test may damage."""
    return Path(shutil.copytree(whole_pack, tmp_path / "packs" / "tiny-1a2b3c4d-native"))

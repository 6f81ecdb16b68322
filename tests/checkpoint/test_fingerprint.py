"""The fingerprint follows the content: copies have the same, other weights, shapes, shards or configs have another."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from offload.checkpoint.fingerprint import checkpoint_fingerprint
from tests.tiny_models import build_tiny


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "moved here"))


def test_copies_and_times_do_not_count(checkpoint: Path, copy: Path, tmp_path: Path) -> None:
    wanted = checkpoint_fingerprint(checkpoint)
    assert len(wanted) == 16
    assert int(wanted, 16) >= 0
    for file in copy.iterdir():
        os.utime(file, (1, 1))
    (copy / "README.md").write_text("not a weight")
    assert checkpoint_fingerprint(copy) == wanted
    linked = tmp_path / "links"  # as in the hub's cache
    linked.mkdir()
    for file in copy.iterdir():
        (linked / file.name).symlink_to(file)
    assert checkpoint_fingerprint(linked) == wanted


def test_other_weights_of_the_same_shape(checkpoint: Path, tmp_path: Path) -> None:
    other = build_tiny("mixtral", tmp_path / "other", seed=1, tokenizer=False)
    assert checkpoint_fingerprint(other) != checkpoint_fingerprint(checkpoint)


def test_config_name_and_size_count(copy: Path) -> None:
    seen = {checkpoint_fingerprint(copy)}
    config = copy / "config.json"
    config.write_text(config.read_text().replace("silu", "gelu"))
    seen.add(checkpoint_fingerprint(copy))
    first = min(copy.glob("*.safetensors"))
    moved = first.rename(copy / "other.safetensors")
    seen.add(checkpoint_fingerprint(copy))
    moved.write_bytes(moved.read_bytes() + b"\0")
    seen.add(checkpoint_fingerprint(copy))
    moved.unlink()
    seen.add(checkpoint_fingerprint(copy))
    assert len(seen) == 5


@pytest.mark.parametrize("part", [0.0, 0.05, 0.3, 0.5, 0.77, 1.0])
def test_changed_stretch_is_noticed_wherever_it_lies(part: float, tmp_path: Path) -> None:
    """A tenth of a large file, as when somebody trained only some of the layers."""
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    content = bytearray(4_000_000)
    content[:8] = (1000).to_bytes(8, "little")
    file.write_bytes(content)
    before = checkpoint_fingerprint(tmp_path)
    start = int(part * (len(content) - 400_000))
    content[start + 8 : start + 400_008] = b"\1" * 400_000
    file.write_bytes(content[:4_000_000])
    assert checkpoint_fingerprint(tmp_path) != before

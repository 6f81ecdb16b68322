"""The doctor's looks at packages, processor, card and storage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from offload.checkpoint.manifest import EXPERT_FILE_NAME
from offload.doctor import card, examine, processor, software, storage
from offload.events import Finding
from offload.paths import packs_folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_LOCAL_CACHE", str(tmp_path / "cache"))


def only(findings: list[Finding], state: str) -> list[Finding]:
    return [one for one in findings if one.state == state]


def test_here_nothing_is_a_problem() -> None:
    """Where the tests run, everything that a command needs is there."""
    findings = list(examine())
    assert not only(findings, "problem")
    assert {"packages", "processor", "memory", "card", "storage", "packs", "hub"} <= {one.area for one in findings}
    assert all(one.remedy for one in findings if one.state != "ok")


def test_packages_that_are_missing_or_too_old() -> None:
    assert software.check(Requirement("torch>=2.6")) is None  # 2.13.0+cpu counts, too
    missing = software.check(Requirement("no-such-package-anywhere>=1,<2"))
    assert missing is not None and missing.state == "problem"
    assert missing.remedy == "pip install 'no-such-package-anywhere<2,>=1'"
    old = software.check(Requirement("torch>=99"))
    assert old is not None and torch.__version__ in old.text and ">=99" in old.text


def test_a_broken_package_ends_the_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "requires", lambda name: ["no-such-package-anywhere", 'gguf>=99; extra == "demo"'])
    findings = list(examine())
    assert [one.state for one in findings if one.state != "ok"] == ["problem"]  # an extra is nobody's duty
    assert {one.area for one in findings} == {"packages"}


def test_a_look_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Finding]:
        raise ValueError("no such thing")

    monkeypatch.setattr(processor, "memory", broken)
    (problem,) = only(list(examine()), "problem")
    assert problem.area == "memory" and "no such thing" in problem.text


def test_kernels_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "load_kernels", lambda failed: failed("no C compiler was found"))
    found = next(one for one in processor.processor() if one.area == "kernels")
    assert found.state == "note" and "no C compiler was found" in found.text and "compiler" in found.remedy


def test_a_quota_of_the_container(tmp_path: Path) -> None:
    assert processor.cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert processor.cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert processor.cpu_quota(tmp_path) == 1.5


def test_a_driver_without_a_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(card, "cuda_is_there", lambda: False)
    monkeypatch.setattr(card, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert [one.state for one in card.card()] == ["ok"]
    (tmp_path / "version").write_text("NVRM version")
    monkeypatch.setattr(torch.version, "cuda", None)
    (built_without,) = card.card()
    assert built_without.state == "note" and "TORCH=torch" in built_without.remedy
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (hidden,) = card.card()
    assert "CUDA_VISIBLE_DEVICES" in hidden.remedy


def test_a_cache_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (found,) = storage.cache(tmp_path / "file" / "cache")
    assert found.state == "problem" and "RUN_LOCAL_CACHE" in found.remedy


def test_little_space_and_no_direct_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=2**20))
    monkeypatch.setattr(storage, "reads_directly", lambda place: False)
    found = storage.cache(tmp_path / "cache")
    assert [one.state for one in found] == ["note", "note"]
    assert all("--experts-dir" in one.remedy for one in found)
    assert not (tmp_path / "cache").exists() and not list(tmp_path.glob("probe-*"))


def test_a_damaged_pack_is_named() -> None:
    pack = packs_folder() / "half"
    pack.mkdir(parents=True)
    (pack / EXPERT_FILE_NAME).write_bytes(bytes(100))
    (found,) = only(storage.storage(), "note")[-1:]
    assert found.area == "packs" and "half" in found.text and "models --remove half" in found.remedy

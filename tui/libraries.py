"""Set up the libraries under the engine: quiet, off the network if asked. Must run before they are imported."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping

_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' bars follow it
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
}
# Waiting threads soon sleep instead of spinning: with other work on the cores, spinning took 10 times as long.
_THREADS = {"GOMP_SPINCOUNT": "5000"}


def prepare_libraries(offline: bool) -> None:
    """Set what the libraries read when they are imported; what the user has set stays.

    ``RUN_LOCAL_DEBUG=1`` leaves their output on.
    """
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    for name, value in _THREADS.items():
        os.environ.setdefault(name, value)
    if os.environ.get("RUN_LOCAL_DEBUG", "") not in ("", "0"):
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"(transformers|huggingface_hub|tokenizers|safetensors|torch)(\.|$)")


def hub_is_offline(environ: Mapping[str, str]) -> bool:
    """Whether the user has switched the hub off with the hub's own variable."""
    return environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")

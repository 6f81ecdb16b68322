"""Tables in CSV with a header: this project's own, and those of programs that write a row a token or a row an expert.

Known to fit: BigMoeOnEdge ``--route-trace`` (``turn,phase,step,layer,slot,expert,weight,...``, a row an expert, with a
preamble of ``# key=value``), moe-beyond (``Layer ID,Batch Number,Token,Activated Expert IDs``), and the moe-analysis
scripts for llama.cpp (``layer_id,expert_ids``).
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from cache.trace_forms.base import Form, FormError, Rows, floats_in, numbers_in, phase_number, whole_number

_NAMES = {
    "request": ("request", "turn", "request_id", "req_id", "prompt_id", "batch number"),
    "phase": ("phase",),
    "step": ("step", "token_idx", "position", "pos"),
    "forward": ("forward",),
    "layer": ("layer", "layer_id", "layer id"),
    "ids": ("ids", "experts", "expert_ids", "topk_ids", "activated expert ids"),
    "weights": ("weights", "topk_weights", "scores"),
    "slot": ("slot", "rank"),
    "expert": ("expert", "expert_id"),
    "weight": ("weight", "score"),
}
_META = {"n_expert": "experts", "experts": "experts", "n_expert_used": "top_k", "top_k": "top_k", "model": "model"}


class Table(Form):
    name = "csv"
    summary = "CSV with a header, a row a token or a row an expert (BigMoeOnEdge, moe-beyond, llama.cpp scripts)"

    def matches(self, start: str) -> bool:
        header = next((line for line in start.splitlines() if line.strip() and not line.startswith("#")), "")
        fields = _fields(next(csv.reader([header]), []))
        return "layer" in fields and bool(fields.keys() & {"ids", "expert"})

    def read(self, lines: Iterable[str], rows: Rows) -> None:
        reader = csv.reader(_without_preamble(lines, rows.meta))
        fields = _fields(next(reader, []))
        if "layer" not in fields or not fields.keys() & {"ids", "expert"}:
            raise FormError("the header needs a column 'layer', and 'experts' or 'expert'")
        cells = ({name: row[at] for name, at in fields.items()} for row in _whole_rows(reader, fields))
        if "ids" in fields:
            for cell in cells:
                _add(rows, cell, numbers_in(cell["ids"]), floats_in(cell.get("weights", "")))
        else:
            _read_a_row_an_expert(cells, rows)


def _fields(header: list[str]) -> dict[str, int]:
    """Where which column stands."""
    columns = [name.strip().lower() for name in header]
    return {
        name: columns.index(alias)
        for name, aliases in _NAMES.items()
        if (alias := next((alias for alias in aliases if alias in columns), None)) is not None
    }


def _without_preamble(lines: Iterable[str], meta: dict[str, Any]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("#"):
            yield line
            continue
        pairs = dict(word.split("=", 1) for word in line[1:].split() if "=" in word)
        for name, key in _META.items():
            if name in pairs:
                meta[key] = pairs[name] if key == "model" else whole_number(pairs[name], name)
        if "expert_bytes" in pairs:
            meta["expert_bytes"] = max(meta.get("expert_bytes", 0), whole_number(pairs["expert_bytes"], "expert_bytes"))


def _whole_rows(reader: Iterator[list[str]], fields: dict[str, int]) -> Iterator[list[str]]:
    width = max(fields.values()) + 1
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise FormError(str(error)) from None
        if row:
            if len(row) < width:
                raise FormError(f"{len(row)} columns instead of {width}")
            yield row


def _add(rows: Rows, cell: dict[str, str], ids: list[int], weights: list[float]) -> None:
    rows.add(
        whole_number(cell["layer"], "layer"),
        ids,
        weights,
        request=cell.get("request", "0"),
        phase=phase_number(cell["phase"]) if "phase" in cell else None,
        step=whole_number(cell["step"], "step") if "step" in cell else None,
        forward=whole_number(cell["forward"], "forward") if "forward" in cell else None,
    )


def _read_a_row_an_expert(cells: Iterator[dict[str, str]], rows: Rows) -> None:
    """Neighbouring rows of one token and layer belong together."""

    def token(cell: dict[str, str]) -> tuple[str | None, ...]:
        return tuple(cell.get(name) for name in ("request", "phase", "step", "forward", "layer"))

    for _, group in itertools.groupby(cells, token):
        some = list(group)
        if all("slot" in cell for cell in some):
            some.sort(key=lambda cell: whole_number(cell["slot"], "slot"))
        ids = [whole_number(cell["expert"], "expert") for cell in some]
        weights = [floats_in(cell["weight"])[0] for cell in some] if "weight" in some[0] else []
        _add(rows, some[0], ids, weights)

"""JSON lines, one object a token and layer (or a batch of tokens): this project's own and those of vLLM loggers.

Known to fit: ``{"type": "route", "req_id", "token_idx", "layer", "topk_ids", "topk_weights"}`` after a line
``{"type": "meta", "model_id", "top_k", ...}``, as several loggers for vLLM's FusedMoE write it, and
``{"layer", "batch_id", "topk_experts": [[...], ...]}`` with a list for each token of a batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from cache.trace_forms.base import Form, FormError, Rows, phase_number, whole_number

_NAMES = {
    "request": ("request", "req_id", "request_id", "batch_id"),
    "step": ("step", "token_idx", "position"),
    "forward": ("forward",),
    "ids": ("ids", "topk_ids", "topk_experts", "experts", "expert_ids"),
    "weights": ("weights", "topk_weights", "scores"),
}
_META = {"model": "model", "model_id": "model", "experts": "experts", "num_experts": "experts", "top_k": "top_k"}


class Records(Form):
    name = "jsonl"
    summary = "JSON lines, one object a token and layer (loggers for vLLM)"

    def matches(self, start: str) -> bool:
        for line in start.splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                return False
            if not isinstance(value, dict):
                return False
            if value.get("type") == "meta":
                return True
            return "layer" in value and _of(value, "ids") is not None
        return False

    def read(self, lines: Iterable[str], rows: Rows) -> None:
        for line in lines:
            if not line.strip():
                continue
            value = parse_object(line)
            if value.get("type") == "meta":
                rows.meta |= {key: value[name] for name, key in _META.items() if value.get(name)}
                for name in ("experts", "top_k"):
                    if name in rows.meta:
                        rows.meta[name] = whole_number(rows.meta[name], name)
                continue
            ids, weights = _of(value, "ids"), _of(value, "weights")
            if "layer" not in value or not isinstance(ids, list):
                raise FormError("an object needs 'layer' and 'topk_ids' (a list)")
            batch = bool(ids) and isinstance(ids[0], list)
            tokens = ids if batch else [ids]
            shares = (weights if batch else [weights]) if weights else [[]] * len(tokens)
            if len(shares) != len(tokens):
                raise FormError(f"{len(tokens)} tokens, but weights of {len(shares)}")
            step, forward, request = (_of(value, name) for name in ("step", "forward", "request"))
            for number, (chosen, share) in enumerate(zip(tokens, shares, strict=True)):
                rows.add(
                    whole_number(value["layer"], "layer"),
                    whole_numbers(chosen),
                    [float(one) if isinstance(one, int | float) else float("nan") for one in share],
                    request="0" if request is None else str(request),
                    phase=None if value.get("phase") is None else phase_number(value["phase"]),
                    step=None if step is None else whole_number(step, "step") + number,
                    forward=None if forward is None else whole_number(forward, "forward"),
                )


def parse_object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise FormError(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise FormError("not a JSON object")
    return value


def whole_numbers(values: object) -> list[int]:
    if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
        raise FormError(f"'{str(values)[:40]}' is not a list of whole numbers")
    return values


def _of(value: dict[str, Any], name: str) -> Any:
    return next((value[alias] for alias in _NAMES[name] if value.get(alias) is not None), None)

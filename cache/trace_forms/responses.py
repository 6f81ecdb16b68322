"""Answers of a vLLM server that runs with ``--enable-return-routed-experts``: one JSON object a request.

``prompt_routed_experts`` is [prompt tokens, MoE layers, k] and each choice's ``routed_experts`` [new tokens, MoE
layers, k] (vLLM's documentation, "Routed Experts"). They have no weights, and layers are numbered from 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cache.trace import DECODE, PREFILL
from cache.trace_forms.base import Form, FormError, Rows
from cache.trace_forms.records import parse_object, whole_numbers


class Responses(Form):
    name = "vllm"
    summary = "answers of a vLLM server with --enable-return-routed-experts, one JSON object a line"

    def matches(self, start: str) -> bool:
        return start.lstrip().startswith("{") and 'routed_experts"' in start

    def read(self, lines: Iterable[str], rows: Rows) -> None:
        number = 0
        for line in lines:
            if not line.strip():
                continue
            value = parse_object(line)
            rows.meta.setdefault("model", value.get("model"))
            choices = value.get("choices") or [value]
            if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
                raise FormError("'choices' is not a list of objects")
            for choice in choices:
                prompt = value.get("prompt_routed_experts") or choice.get("prompt_routed_experts") or []
                answer = choice.get("routed_experts") or []
                if not prompt and not answer:
                    raise FormError("no 'routed_experts'; start the server with --enable-return-routed-experts")
                _add(rows, str(number), PREFILL, 0, prompt)
                _add(rows, str(number), DECODE, len(prompt), answer)
                number += 1


def _add(rows: Rows, request: str, phase: int, start: int, tokens: Any) -> None:
    if not isinstance(tokens, list) or not all(isinstance(layers, list) for layers in tokens):
        raise FormError("routed experts must be lists of tokens, layers and experts")
    for step, layers in enumerate(tokens, start):
        for layer, ids in enumerate(layers):
            rows.add(layer, whole_numbers(ids), request=request, phase=phase, step=step)

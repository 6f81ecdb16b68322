"""What ``trace info`` shows. The figures come as JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tui.charts import bar, spark
from tui.tables import table


def trace_text(found: dict[str, Any]) -> str:
    """What ``trace info`` shows of one trace."""
    mean, uniform = found["mean"], found["uniform_overlap"]
    phase = {"decode": "decoding", "prefill": "prompts"}[found["measured"]]
    rows = [
        ("model", found["model"]),
        ("shape", f"{found['layers']} layers, {found['experts']} experts each, top {found['top_k']}"),
        ("requests", str(found["requests"])),
        ("tokens", f"{found['prefill_tokens']} of prompts, {found['decode_tokens']} decoded"),
        ("forward passes", f"{found['passes']}, {found['events']} events of up to {found['largest_event']} experts"),
    ]
    measured = [
        ("same experts as the token before", _percent(mean["overlap"]), f"chance: {_percent(uniform)}"),
        ("same first choice", _percent(mean["first_repeated"]), f"chance: {_percent(1 / found['experts'])}"),
        ("at least one expert shared", _percent(mean["any_shared"]), ""),
        ("foretold by the layer before", _percent(mean["foretold"]), f"with {found['top_k']} guesses"),
        ("entropy of all uses", _percent(mean["entropy"]), "100 %: all experts alike"),
        ("entropy within a request", _percent(mean["entropy_in_request"]), "lower: a request keeps to some experts"),
        ("uses of the top 10 % of experts", _percent(mean["top_10"]), ""),
        ("uses of the top 25 % of experts", _percent(mean["top_25"]), ""),
        (
            "Gini coefficient of the uses",
            "-" if mean["gini"] is None else f"{mean['gini']:.2f}",
            "0: even, 1: one has all",
        ),
        ("experts used at all", _percent(mean["distinct"]), ""),
    ]
    parts = [
        table(rows),
        f"of {phase}, mean over the layers:\n" + table(measured, right=(1,)),
        _lags(found["lags"], uniform),
        _working_set(found["working_set"], found["experts"]),
        _predictors(found.get("predictors", [])),
        _layers(found["by_layer"]),
    ]
    return "\n".join(part for part in parts if part)


def _lags(lags: Sequence[dict[str, Any]], uniform: float) -> str:
    if not lags:
        return ""
    most = max([uniform, *(one["overlap"] for one in lags)])
    rows = [(f"{one['tokens']}", _percent(one["overlap"]), bar(one["overlap"], most, 40)) for one in lags]
    rows.append(("chance", _percent(uniform), bar(uniform, most, 40)))
    return "same experts as so many tokens before:\n" + table(rows, right=(0, 1))


def _working_set(windows: Sequence[dict[str, Any]], experts: int) -> str:
    if not windows:
        return ""
    rows = [
        (str(one["tokens"]), f"{one['distinct_experts']:.1f}", bar(one["distinct_experts"], experts, 40))
        for one in windows
    ]
    return f"distinct experts of a layer, of {experts}, in so many tokens:\n" + table(rows, right=(0, 1))


def _predictors(scores: Sequence[dict[str, Any]]) -> str:
    if not scores:
        return ""
    rows = [
        (one["predictor"], str(one["guesses"]), _percent(one["recall"]), _percent(one["precision"])) for one in scores
    ]
    text = table([("PREDICTOR", "GUESSES", "RECALL", "PRECISION"), *rows], right=(1, 2, 3))
    return f"of the next layer's experts foretold, and of the guesses right:\n{text}"


def _layers(layers: Sequence[dict[str, Any]]) -> str:
    header = ("LAYER", "SAME", "FIRST", "FORETOLD", "ENTROPY", "TOP 25 %", "USED", "")
    most = max((one["overlap"] or 0 for one in layers), default=0) or 1
    rows = [
        (
            str(one["layer"]), _percent(one["overlap"]), _percent(one["first_repeated"]), _percent(one["foretold"]),
            _percent(one["entropy_in_request"]), _percent(one["top_25"]), _percent(one["distinct"]),
            bar(one["overlap"] or 0, most, 20),
        )
        for one in layers
    ]  # fmt: skip
    line = spark([one["overlap"] for one in layers], most)
    return f"by layer (the bars are SAME; all of them: {line}):\n" + table([header, *rows], right=range(7))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"

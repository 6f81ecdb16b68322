"""What ``tune`` shows. The figures come as JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tui.charts import Curve, curves
from tui.tables import table


def tune_text(found: dict[str, Any]) -> str:
    """What ``tune`` shows: a table of the best of every policy, and the curves. ``found`` is the result's JSON."""
    rows = _best_of_each(found)
    sizes = sorted({row["slots"] for row in rows})
    speed = rows[0]["tokens_per_s"] is not None
    header = ["POLICY", "SCOPE", "PREFETCH", "BEFORE"]
    for size in sizes:
        share = next(row["residency"] for row in rows if row["slots"] == size)
        header += [f"{100 * share:.3g} %", "±", "BELOW"] + (["TOKENS/S"] if speed else [])
    lines = [header]
    for name in dict.fromkeys(_name(row) for row in sorted(rows, key=lambda row: _rank(row, found["slots"], rows))):
        cells = list(name)
        for size in sizes:
            row = next((row for row in rows if (_name(row), row["slots"]) == (name, size)), None)
            cells += [""] * (3 + speed) if row is None else _cells(row, speed)
        lines.append(cells)
    plain = [at for at, name in ((2, "predictor"), (3, "learn")) if not any(row[name] for row in rows)]
    lines = [[cell for at, cell in enumerate(line) if at not in plain] for line in lines]
    text = table(lines, right=range(4 - len(plain), len(lines[0])))
    return (
        f"{found['model']}: {found['requests']} requests in {found['folds']} folds, {found['events']} events\n"
        "hit rate by share of the experts that have a slot, its spread over the folds (±), points below Belady:\n"
        f"{text}\n{curves(tune_curves(found)[:9])}"
    )


def advice_text(found: dict[str, Any]) -> str:
    """What to use, in words; the line to paste comes after it."""
    one = next(one for one in found["advice"] if one["slots"] == found["slots"])
    unit = " %" if one["gain_unit"].startswith("share") else " points"
    what = "tokens/s" if unit == " %" else "hit rate"
    gain = f"{100 * one['gain']:+.2f}{unit}"
    if one["gain_spread"] is not None:
        gains = [100 * value for value in one["gain_by_fold"]]
        gain += f" ± {100 * one['gain_spread']:.2f} (folds {min(gains):+.2f} to {max(gains):+.2f})"
    how = (
        "on requests that took no part in the choice" if one["cross_validated"] else "on the requests it was chosen by"
    )
    where = f"for {one['slots']} slots ({100 * one['residency']:.3g} % of the experts)"
    default = f"the default ({one['default']['policy']}, {one['default']['scope']})"
    if one["is_default"]:
        return f"{where}: keep {default}; choosing among the candidates gains nothing {how}: {what} {gain}\n"
    return f"{where}: {what} {gain} over {default}, {how}\n"


def tune_curves(found: dict[str, Any]) -> list[Curve]:
    """The best of every policy and scope over the sizes, best first; Belady dashed."""
    rows = _best_of_each(found)
    names = dict.fromkeys(_name(row) for row in sorted(rows, key=lambda row: _rank(row, found["slots"], rows)))
    best_scope: dict[tuple[str, str], Curve] = {}
    for name in names:
        points = sorted((row["residency"], row["hit_rate"]) for row in rows if _name(row) == name)
        family = (name[0].partition(":")[0], name[2])  # the best scope, and with or without learning
        label = " ".join(part for part in name if part and part != "off")
        best_scope.setdefault(family, Curve(label, tuple(points), dashed=family[0] == "belady"))
    return list(best_scope.values())


def _best_of_each(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the candidates that differ in parameters only, the one that is best at the budget's size, at all sizes."""
    best: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in found["results"]:
        if row["slots"] == found["slots"]:
            family = (row["policy"].partition(":")[0], *_name(row)[1:])
            if family not in best or _value(row) > _value(best[family]):
                best[family] = row
    names = {_name(row) for row in best.values()}
    return [row for row in found["results"] if _name(row) in names]


def _name(row: dict[str, Any]) -> tuple[str, str, str, str]:
    return row["policy"], row["scope"], row["predictor"] or "off", "learned" if row["learn"] else ""


def _value(row: dict[str, Any]) -> float:
    value: float = row["hit_rate"] if row["tokens_per_s"] is None else row["tokens_per_s"]
    return value


def _rank(row: dict[str, Any], slots: int, rows: Sequence[dict[str, Any]]) -> tuple[float, ...]:
    return (-next(_value(other) for other in rows if _name(other) == _name(row) and other["slots"] == slots),)


def _cells(row: dict[str, Any], speed: bool) -> list[str]:
    spread = "" if row["hit_rate_spread"] is None else f"{100 * row['hit_rate_spread']:.1f}"
    below = "" if row["below_belady"] is None else f"{100 * row['below_belady']:.1f}"
    cells = [f"{100 * row['hit_rate']:.2f}", spread, below]
    return [*cells, f"{row['tokens_per_s']:.2f}"] if speed else cells


def live_report(found: Mapping[str, Any], notes: Sequence[str], most: int = 12) -> str:
    """What ``/tune`` found, as Markdown: the advice, and the best ways with what is used now among them."""
    one = next(one for one in found["advice"] if one["slots"] == found["slots"])
    now, best = one["default"], {"policy": one["policy"], "scope": one["scope"]}
    how = "questions that took no part in the choice" if one["cross_validated"] else "the question it was chosen by"
    gain = f"{100 * one['gain']:+.2f}"
    if one["gain_spread"] is not None:
        gain += f" ± {100 * one['gain_spread']:.2f}"
    if one["is_default"]:
        advice = f"**Keep {now['policy']}, scope {now['scope']}**: choosing among the others gains nothing on {how}."
    else:
        advice = f"**Change to {best['policy']}, scope {best['scope']}**: {gain} points of hit rate on {how}."
    rows = sorted(_best_of_each(dict(found)), key=_value, reverse=True)
    ways = {
        (row["policy"], row["scope"]): row
        for row in rows
        if row["slots"] == found["slots"] and row["policy"] != "belady"  # which only knows how far the others are below
    }
    for way in (best, now):  # they may lie far down, or be other parameters of a policy that is in the list
        if not any(_is(row, way) for row in [*ways.values()][:most]):
            ways |= {(row["policy"], row["scope"]): row for row in found["results"] if _is(row, way)}
    lines = ["| policy | scope | hit rate | below Belady | |", "| --- | --- | ---: | ---: | --- |"]
    for number, row in enumerate(sorted(ways.values(), key=_value, reverse=True)):
        marks = [mark for mark, way in (("now", now), ("advice", best)) if _is(row, way)]
        if number < most or marks:
            below = f"{100 * row['below_belady']:.2f}"
            lines.append(
                f"| {row['policy']} | {row['scope']} | {100 * row['hit_rate']:.2f} % | {below} | {', '.join(marks)} |"
            )
    questions = f"{found['requests']} question{'' if found['requests'] == 1 else 's'}"
    what = (
        f"{questions} replayed ({found['events']} events) with {found['slots']} slots, "
        f"{100 * one['residency']:.3g} % of the experts, from an empty cache."
    )
    return "\n\n".join([advice, *(f"*{note}*" for note in notes), what, "\n".join(lines)])


def _is(row: Mapping[str, Any], way: Mapping[str, Any]) -> bool:
    return bool((row["policy"], row["scope"]) == (way["policy"], way["scope"]))

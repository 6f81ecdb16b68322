"""``ROUTE_TRACE`` of colibri: a line ``CALL ROW LAYER EXPERT:WEIGHT ...`` for each token of each call of a layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from cache.trace import DECODE, PREFILL
from cache.trace_forms.base import Form, FormError, Rows, floats_in, whole_number

_LINE = re.compile(r"\d+ \d+ \d+( \d+:\S+)+")


class Colibri(Form):
    name = "colibri"
    summary = "ROUTE_TRACE of colibri: lines CALL ROW LAYER EXPERT:WEIGHT ..."

    def matches(self, start: str) -> bool:
        first = next(iter(start.splitlines()), "")
        return _LINE.fullmatch(" ".join(first.split())) is not None

    def read(self, lines: Iterable[str], rows: Rows) -> None:
        called: list[tuple[int, int]] = []
        for line in lines:
            words = line.split()
            if not words:
                continue
            if len(words) < 4:
                raise FormError("expected CALL ROW LAYER EXPERT:WEIGHT ...")
            call, _, layer = (whole_number(word, "number") for word in words[:3])
            pairs = [word.partition(":") for word in words[3:]]
            rows.add(
                layer,
                [whole_number(expert, "expert") for expert, _, _ in pairs],
                [floats_in(weight)[0] if weight else 0.0 for _, _, weight in pairs],
            )
            called.append((call, layer))
        tokens = Counter(called)
        rows.phase = [PREFILL if tokens[call] > 1 else DECODE for call in called]

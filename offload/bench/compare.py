"""Settings against each other, in turns (A B A B), each run in a process of its own. Imports no torch."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from offload.bench.child import run_child
from offload.bench.figures import TABLE, Spread, ratio, spreads
from offload.bench.request import Setting

_SHOWN = (
    "decode_tokens_per_s", "warmup_tokens_per_s", "prefill_tokens_per_s", "ttft_s", "decode_hit_rate", "rss_peak_bytes"
)  # fmt: skip

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Compared:
    """One setting and the JSON objects of its runs, in order."""

    setting: Setting
    runs: tuple[dict[str, Any], ...]

    def spreads(self) -> dict[str, Spread | None]:
        return spreads([run["bench"]["runs"][0] for run in self.runs])


@dataclass(frozen=True, slots=True)
class SpeedComparison:
    """Ratios are of medians, to the first setting's. ``order`` has the names as they ran."""

    right: ClassVar[tuple[int, ...]] = (2, 3, 4, 5)

    settings: tuple[Compared, ...]
    order: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        first = self.settings[0].spreads()
        return {
            "rounds": len(self.settings[0].runs),
            "order": list(self.order),
            "settings": [
                {
                    "name": each.setting.name,
                    "flags": list(each.setting.flags),
                    "summary": {
                        name: found and asdict(found) | {"ratio": _median_ratio(found, first[name])}
                        for name, found in each.spreads().items()
                    },
                    "runs": list(each.runs),
                }
                for each in self.settings
            ],
        }

    def summary(self) -> list[str]:
        bench = self.settings[0].runs[0]["bench"]
        rounds = len(self.settings[0].runs)
        return [
            f"{rounds} {'round' if rounds == 1 else 'rounds'}, each setting in a process of its own: "
            f"{bench['prompt_tokens']} prompt tokens, {bench['warmup_tokens']} new ones to warm up, "
            f"{bench['new_tokens']} measured",
            *_describe(self.settings),
        ]

    def rows(self) -> list[tuple[str, ...]]:
        found = [(each.setting.name, each.spreads()) for each in self.settings]
        first = found[0][1]
        rows: list[tuple[str, ...]] = [("FIGURE", "SETTING", "MEDIAN", "MIN", "MAX", "RATIO")]
        for figure in (figure for shown in _SHOWN for figure in TABLE if figure.name == shown):
            for number, (name, every) in enumerate(found):
                seen = every[figure.name]
                quotient = _median_ratio(seen, first[figure.name])
                rows.append(
                    (
                        figure.label if number == 0 else "",
                        name,
                        *(figure.text(getattr(seen, part, None)) for part in ("median", "min", "max")),
                        "-" if quotient is None else f"{quotient:.3f}",
                    )
                )
        return rows


@dataclass(frozen=True, slots=True)
class QualityComparison:
    """The first setting is the reference of the others."""

    right: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 5)

    settings: tuple[Compared, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "reference": self.settings[0].setting.name,
            "settings": [
                {"name": each.setting.name, "flags": list(each.setting.flags), "result": each.runs[0]}
                for each in self.settings
            ],
        }

    def summary(self) -> list[str]:
        result = self.settings[0].runs[0]
        return [
            f"{result['counted_tokens']} tokens of {result['file']} in windows of at most {result['window_tokens']}; "
            f"the reference is '{self.settings[0].setting.name}'",
            *_describe(self.settings),
        ]

    def rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [
            ("SETTING", "MEAN NLL", "PERPLEXITY", "RATIO", "MEAN KL (NATS)", "SAME TOP TOKEN")
        ]
        for each in self.settings:
            result = each.runs[0]
            against = result["reference"]
            compared = ("1.0000", "-", "-")
            if against is not None:
                compared = (
                    f"{against['perplexity_ratio']:.4f}",
                    f"{against['mean_kl_nats']:.6f}",
                    f"{100 * against['top_token_agreement']:.2f} %",
                )
            rows.append((each.setting.name, f"{result['mean_nll_nats']:.5f}", f"{result['perplexity']:.4f}", *compared))
        return rows


def compare_speed(
    settings: Sequence[Setting], rounds: int, command: Callable[[Setting, list[str]], list[str]], say: Say
) -> SpeedComparison:
    """Run every setting ``rounds`` times, in turns, so that what drifts on a machine hits all of them alike.

    ``command`` gives the command line of a setting with some flags of ours; ``say`` shows a line to the user.
    Raises RunLocalError at the first run that fails; no other one is started.
    """
    runs: dict[str, list[dict[str, Any]]] = {setting.name: [] for setting in settings}
    order = []
    for number in range(rounds):
        for setting in settings:
            say(f"{setting.name}: round {number + 1} of {rounds}")
            on_line = _prefixed(say, setting) if number == 0 else _ignore  # later rounds load as the first did
            result = run_child(setting.name, command(setting, []), on_line)
            rate = result["bench"]["runs"][0]["decode_tokens_per_s"]
            say(f"{setting.name}: " + ("-" if rate is None else f"{rate:.2f} tokens/s"))
            runs[setting.name].append(result)
            order.append(setting.name)
    return SpeedComparison(tuple(Compared(setting, tuple(runs[setting.name])) for setting in settings), tuple(order))


def compare_quality(
    settings: Sequence[Setting], command: Callable[[Setting, list[str]], list[str]], say: Say
) -> QualityComparison:
    """Evaluate every setting on the same tokens; the first leaves its probabilities for the others to compare with.

    Those go through a file in the temporary folder (``TMPDIR``) that never has a name, so that the system
    deletes it when the last process lets go of it, however that ends. Arguments and errors as of :func:`compare_speed`.
    """
    done: list[Compared] = []
    with tempfile.TemporaryFile(prefix="run-local-bench-") as file:
        path = f"/dev/fd/{file.fileno()}"
        for setting in settings:
            say(f"{setting.name}: evaluating")
            flag = f"--reference={path}" if done else f"--reference-out={path}"
            own = [flag] if len(settings) > 1 else []
            result = run_child(setting.name, command(setting, own), _prefixed(say, setting), [file.fileno()])
            say(f"{setting.name}: perplexity {result['perplexity']:.4f}")
            done.append(Compared(setting, (result,)))
    return QualityComparison(tuple(done))


def _prefixed(say: Say, setting: Setting) -> Say:
    return lambda line: say(f"{setting.name}: {line}")


def _ignore(line: str) -> None:
    pass


def _describe(settings: Sequence[Compared]) -> list[str]:
    return [f"{each.setting.name}: {shlex.join(each.setting.flags) or '(no flags of its own)'}" for each in settings]


def _median_ratio(spread: Spread | None, first: Spread | None) -> float | None:
    return ratio(getattr(spread, "median", None), getattr(first, "median", None))

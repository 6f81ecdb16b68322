"""What a bench may be asked for, and the settings of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from offload.bench.request import BenchRequest, Setting, Workload, parse_settings
from offload.errors import UsageError

TEXT = Path("text.txt")


def test_defaults() -> None:
    request = BenchRequest()
    assert (request.workload, request.rounds, request.mode) == (Workload(11, 32, 32), 1, "speed")
    assert request.child_flags() == []
    assert request.given() == set()


def test_a_workload_adds_up() -> None:
    assert Workload(11, 32, 8).total == 51
    assert Workload(11, 0, 8).marked == 1, "the first token comes from the prefill and cannot be measured"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt_tokens": 0}, "--prompt-tokens must be at least 1"),
        ({"warmup_tokens": -1}, "--warmup-tokens must be at least 0"),
        ({"new_tokens": 0}, "--new-tokens must be at least 1"),
        ({"repeat": 0}, "--repeat must be at least 1"),
        ({"tokens": 1, "perplexity": TEXT}, "--tokens must be at least 2"),
        ({"tokens": 5}, "--tokens belongs to --perplexity FILE"),
        ({"reference": TEXT}, "--reference belongs to --perplexity FILE"),
        ({"reference_out": TEXT}, "--reference-out belongs to --perplexity FILE"),
        ({"perplexity": TEXT, "repeat": 1}, "--perplexity and --repeat do not go together"),
        ({"perplexity": TEXT, "warmup_tokens": 0}, "--perplexity and --warmup-tokens do not go together"),
        ({"perplexity": TEXT, "reference": TEXT, "reference_out": TEXT}, "--reference and --reference-out do not go"),
        ({"perplexity": TEXT, "compare": ("a=",), "reference": TEXT}, "--compare and --reference do not go together"),
        ({"perplexity": TEXT, "reference_out": Path("./a/../text.txt")}, "--reference-out: .* is the text itself"),
        ({"calibrate": True, "compare": ("a=",)}, "--calibrate and --compare do not go together"),
        ({"calibrate": True, "perplexity": TEXT}, "--calibrate and --perplexity do not go together"),
    ],
)
def test_values_and_pairs_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BenchRequest(**values)


def test_what_goes_to_every_setting() -> None:
    request = BenchRequest(prompt_tokens=3, warmup_tokens=0, repeat=5, compare=("a=",), json=True)
    assert request.child_flags() == ["--prompt-tokens=3", "--warmup-tokens=0"]
    assert BenchRequest(perplexity=TEXT, tokens=9).child_flags() == ["--perplexity=text.txt", "--tokens=9"]


def test_settings_are_split_as_a_shell_would() -> None:
    seen: list[list[str]] = []
    settings = parse_settings(["base=", "two words = --policy 'lfu' --ram=2GiB"], seen.append)
    assert settings == [Setting("base", ()), Setting("two words", ("--policy", "lfu", "--ram=2GiB"))]
    assert seen == [[], ["--policy", "lfu", "--ram=2GiB"]]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["half"], "'half' is not NAME=FLAGS"),
        (["=--ram 1GiB"], "is not NAME=FLAGS"),
        (["  =--ram 1GiB"], "is not NAME=FLAGS"),
        (["--residency=0.5"], "is not NAME=FLAGS"),  # a name was forgotten
        (["a=", "a=--ram 1GiB"], "there are two settings called 'a'"),
        (["a=--policy 'lfu"], "--compare a: No closing quotation"),
    ],
)
def test_settings_that_are_none(texts: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_settings(texts, lambda flags: None)


def test_flags_that_do_not_parse_name_their_setting() -> None:
    def check(flags: list[str]) -> None:
        raise UsageError("--ctx: 'few' is not a whole number")

    with pytest.raises(UsageError, match="--compare a: --ctx: 'few' is not a whole number"):
        parse_settings(["a=--ctx few"], check)

"""Flags and their variables: the same values, the right precedence, and errors that name where a value came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from offload.config import EngineSettings, SamplingSettings
from offload.errors import UsageError
from run_local import build_parser
from tui.flags import FORMAT_FLAGS, MEMORY_FLAGS, MODEL_FLAGS, RUN_FLAGS, SAMPLING_FLAGS, FlagValues, read_flags

NOTHING: Mapping[str, str] = {}


def values(*arguments: str, environ: Mapping[str, str] = NOTHING) -> FlagValues:
    parsed = build_parser().parse_args(["chat", *arguments])
    return read_flags(parsed, parsed.flags, environ)


def test_defaults_are_those_of_the_settings() -> None:
    given = values()
    assert given.engine() == EngineSettings()
    assert given.sampling() == SamplingSettings()


ALL = {
    "--model": "org/name",
    "--preset": "mine",
    "--revision": "abc",
    "--device": "cpu",
    "--ram": "2GiB",
    "--vram": "3GiB",
    "--tiers": "exclusive",
    "--kv-cache": "fp8",
    "--residency": "0.25",
    "--ctx": "128",
    "--policy": "lru",
    "--learn-from": "l.npz",
    "--scope": "layer",
    "--experts-dir": "packs",
    "--prefill-chunk": "64",
    "--read-workers": "2",
    "--format": "int4",
    "--dense-format": "int8",
    "--kernels": "torch",
    "--graphs": "on",
    "--prefetch": "next-gate",
    "--host-policy": "slru",
    "--miss": "cpu",
    "--prefetch-bytes": "64MiB",
    "--trace-out": "t.npz",
    "--cache-log": "c.log",
    "--stats-json": "s.json",
    "--temperature": "0.5",
    "--top-k": "3",
    "--top-p": "0.9",
    "--min-p": "0.1",
    "--repetition-penalty": "1.1",
    "--max-new-tokens": "7",
    "--stop": "END",
    "--seed": "5",
    "--verify": "1",
    "--offline": "yes",
}
ENGINE = EngineSettings(
    model="org/name",
    revision="abc",
    device="cpu",
    ram=2**31,
    vram=3 * 2**30,
    tiers="exclusive",
    kv_cache="fp8",
    residency=0.25,
    context_tokens=128,
    format="int4",
    dense_format="int8",
    kernels="torch",
    graphs="on",
    policy="lru",
    scope="layer",
    prefetch="next-gate",
    miss="cpu",
    host_policy="slru",
    prefetch_bytes=64 * 2**20,
    experts_dir=Path("packs"),
    prefill_chunk=64,
    read_workers=2,
    verify=True,
    offline=True,
    trace_out=Path("t.npz"),
    learn_from=(Path("l.npz"),),
    cache_log=Path("c.log"),
    seed=5,
)
SAMPLING = SamplingSettings(0.5, 3, 0.9, 0.1, 1.1, 7, ("END",), 5)


def test_all_flags() -> None:
    arguments = [part for flag, text in ALL.items() for part in (flag, text) if text not in ("1", "yes")]
    given = values(*arguments, "--verify", "--offline")
    assert (given.engine(), given.sampling()) == (ENGINE, SAMPLING)
    assert given.given["stats_json"] == Path("s.json")


def test_all_variables() -> None:
    environ = {"RUN_LOCAL_" + flag[2:].replace("-", "_").upper(): text for flag, text in ALL.items()}
    given = values(environ=environ)
    assert (given.engine(), given.sampling()) == (ENGINE, SAMPLING)
    assert given.given["stats_json"] == Path("s.json")


def test_the_table_has_every_flag() -> None:
    flags = (*MODEL_FLAGS, *FORMAT_FLAGS, *MEMORY_FLAGS, *RUN_FLAGS, *SAMPLING_FLAGS)
    assert {flag.name for flag in flags} == set(ALL)


def test_a_flag_wins_over_its_variable_and_an_empty_variable_is_unset() -> None:
    given = values("--ctx", "10", environ={"RUN_LOCAL_CTX": "20", "RUN_LOCAL_TOP_K": "", "RUN_LOCAL_VERIFY": "off"})
    assert given.engine().context_tokens == 10
    assert given.sampling().top_k is None
    assert given.engine().verify is False


def test_stop_may_be_repeated() -> None:
    assert values("--stop", "a", "--stop", "b").sampling().stop == ("a", "b")


def test_auto_is_a_size() -> None:
    assert values("--ram", "auto", environ={"RUN_LOCAL_RAM": "1GiB"}).engine().ram is None


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("--ctx", "many"),
        ("--ctx", "1"),
        ("--ram", "lots"),
        ("--ram", "0GiB"),
        ("--residency", "2"),
        ("--residency", "nan"),
        ("--device", "gpu"),
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--top-k", "1.5"),
        ("--top-p", "0"),
        ("--min-p", "2"),
        ("--max-new-tokens", "0"),
        ("--repetition-penalty", "0"),
        ("--seed", "-1"),
        ("--seed", "9" * 30),
        ("--read-workers", "0"),
        ("--prefill-chunk", "0"),
        ("--model", " "),
        ("--stats-json", "a\0b"),
    ],
)
def test_a_bad_value_names_the_flag_or_the_variable(flag: str, text: str) -> None:
    def read(*arguments: str, environ: Mapping[str, str] = NOTHING) -> str:
        given = FlagValues({})
        with pytest.raises(UsageError) as caught:
            try:
                given = values(*arguments, environ=environ)
                given.engine()
                given.sampling()
            except UsageError as error:
                raise UsageError(given.blame(str(error))) from error
        return str(caught.value)

    variable = "RUN_LOCAL_" + flag[2:].replace("-", "_").upper()
    assert read(f"{flag}={text}").startswith(flag)
    assert read(environ={variable: text}).startswith(variable)


def test_a_switch_in_the_environment_must_be_yes_or_no() -> None:
    with pytest.raises(UsageError, match="RUN_LOCAL_VERIFY: 'maybe' is not one of"):
        values(environ={"RUN_LOCAL_VERIFY": "maybe"})


def test_text_must_be_utf_8() -> None:
    with pytest.raises(UsageError, match=r"--stop: not valid UTF-8 at byte 3"):
        values("--stop", b"\xc3\xa9a\xff".decode("utf-8", "surrogateescape"))


def test_flags_are_not_abbreviated() -> None:
    with pytest.raises(UsageError, match="unrecognized arguments: --mod"):
        build_parser().parse_args(["models", "--mod", "x"])

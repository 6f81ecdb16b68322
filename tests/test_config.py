"""Settings: sizes as people write them, and every value that makes no sense refused with its flag in the message."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.config import (
    DEFAULT_MAX_NEW_TOKENS,
    EngineSettings,
    SamplingSettings,
    format_size,
    parse_size,
)
from offload.errors import UsageError

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * GIB),
        ("512MiB", 512 * MIB),
        ("512mib", 512 * MIB),
        ("512 MiB", 512 * MIB),
        (" 3KiB ", 3 * KIB),
        ("1500M", 1500 * MIB),
        ("2G", 2 * GIB),
        ("2GB", 2 * 10**9),
        ("3kb", 3000),
        ("7MB", 7 * 10**6),
        ("1T", TIB),
        ("1TiB", TIB),
        ("1TB", 10**12),
        ("1.5GiB", 3 * GIB // 2),
        ("0.5K", 512),
        ("123", 123),
        ("123B", 123),
        ("1", 1),
        ("0008G", 8 * GIB),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--ram") == size


@pytest.mark.parametrize(
    "text",
    ["", " ", "GiB", "8 8GiB", "8GiBB", "8XB", "-8GiB", "+8GiB", "1e9", ".5G", "5.", "1,5GiB", "8GiB/s", "auto", "∞",
     "0x10", "1_000", "nan", "inf", "\n", "8G\0"],
)  # fmt: skip
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match=r"(?s)^--vram: .* is not a size; write for example 8GiB or 512MiB$"):
        parse_size(text, "--vram")


@pytest.mark.parametrize("text", ["0", "0GiB", "0.0", "0.4", "0.0001K"])
def test_sizes_below_a_byte(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--ram: the size must be above zero$"):
        parse_size(text, "--ram")


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + "GiB", "9" * 308 + "TiB", "9000000000TiB"])
def test_sizes_beyond_any_machine(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--ram: "):
        parse_size(text, "--ram")


@given(st.text(max_size=12))
def test_no_text_breaks_the_parser(text: str) -> None:
    try:
        assert parse_size(text, "--ram") >= 1
    except UsageError as error:
        assert str(error).startswith("--ram: ")


@given(st.integers(1, 2**45))
def test_whole_bytes_are_exact(size: int) -> None:
    assert parse_size(str(size), "--ram") == size
    assert parse_size(f"{size}MiB", "--ram") == size * MIB if size < 2**30 else True


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (512, "512 B"), (1536, "1.5 KiB"), (200 * KIB, "200 KiB"), (MIB, "1.0 MiB"), (999 * MIB, "999 MiB"),
     (GIB, "1.00 GiB"), (1536 * MIB, "1.50 GiB"), (5000 * GIB, "5000.00 GiB"), (-GIB, "-1.00 GiB")],
)  # fmt: skip
def test_format_size(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(1, 2**50))
def test_formatted_sizes_can_be_read_back(size: int) -> None:
    again = parse_size(format_size(size), "--ram")
    assert abs(again - size) <= 0.051 * size


# --- sampling -------------------------------------------------------------------------------------------------------

NOT_NUMBERS: tuple[Any, ...] = ("hot", "1", True, [1], float("nan"), float("inf"), -float("inf"), 10**400)
NOT_WHOLE: tuple[Any, ...] = (2.5, "3", True, [3], 3.0, 2**63, 10**400)
BAD_SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (*NOT_NUMBERS, -0.1, -1),
    "top_p": (*NOT_NUMBERS, 0, -0.5, 1.01),
    "min_p": (*NOT_NUMBERS, -0.01, 1.01),
    "repetition_penalty": (*NOT_NUMBERS, 0, -1.0),
    "top_k": (*NOT_WHOLE, -1),
    "max_new_tokens": (*NOT_WHOLE, None, 0, -5),
    "seed": (*NOT_WHOLE, -1),
    "stop": ("text", ["a"], None, ("",), ("a", ""), (3,), (None,)),
}
GOOD_SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (None, 0, 0.0, 0.7, 5),
    "top_p": (None, 1, 1.0, 0.001),
    "min_p": (None, 0, 0.0, 1),
    "repetition_penalty": (None, 0.5, 1, 2.0),
    "top_k": (None, 0, 1, 10**6),
    "max_new_tokens": (1, 10**9),
    "seed": (None, 0, 2**63 - 1),
    "stop": ((), ("a",), ("\n\n", "END")),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD_SAMPLING.items() for v in values])
def test_bad_sampling_values_name_their_flag(name: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingSettings(**{name: value})
    assert str(caught.value).startswith(f"--{name.replace('_', '-')}")


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in GOOD_SAMPLING.items() for v in values])
def test_good_sampling_values(name: str, value: Any) -> None:
    assert getattr(SamplingSettings(**{name: value}), name) == value


def test_every_sampling_field_is_checked() -> None:
    assert set(SamplingSettings.field_names()) == BAD_SAMPLING.keys() == GOOD_SAMPLING.keys()
    fields = {field.name for field in dataclasses.fields(SamplingSettings)}
    assert fields - set(SamplingSettings.field_names()) == {"ignore_eos"}, "no flag and no batch row sets this one"


def test_overridden() -> None:
    base = SamplingSettings(temperature=0.5, stop=("x",), seed=3)
    assert base.overridden({}) == base
    changed = base.overridden({"top_k": 4, "temperature": None, "max_new_tokens": 7})
    assert (changed.top_k, changed.temperature, changed.max_new_tokens) == (4, None, 7)
    assert (changed.stop, changed.seed) == (("x",), 3)
    assert base.overridden({"stop": "END"}).stop == ("END",)
    assert base.overridden({"stop": ["a", "b"]}).stop == ("a", "b")
    assert base.overridden({"stop": []}).stop == ()
    assert base.overridden({"stop": None}).stop == ()
    assert base == SamplingSettings(temperature=0.5, stop=("x",), seed=3), "the original is left alone"
    row = {"stop": "END"}
    base.overridden(row)
    assert row == {"stop": "END"}


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"temperature": "hot"}, "--temperature"),
        ({"top_k": 2.5}, "--top-k"),
        ({"stop": ["a", ""]}, "--stop"),
        ({"stop": ""}, "--stop"),
        ({"stop": [3]}, "--stop"),
        ({"stop": {"a": 1}}, "--stop"),
        ({"max_new_tokens": None}, "--max-new-tokens"),
        ({"seed": 10**30}, "--seed"),
    ],
)
def test_bad_overrides_name_their_flag(values: dict[str, Any], flag: str) -> None:
    with pytest.raises(UsageError, match=f"^{flag}"):
        SamplingSettings().overridden(values)


# --- the engine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("model", "", "--model"),
        ("model", "  ", "--model"),
        ("device", "tpu", "--device"),
        ("device", "", "--device"),
        ("device", "CPU", "--device"),
        ("residency", 0, "--residency"),
        ("residency", -0.5, "--residency"),
        ("residency", 1.01, "--residency"),
        ("residency", float("nan"), "--residency"),
        ("context_tokens", 1, "--ctx"),
        ("context_tokens", 0, "--ctx"),
        ("context_tokens", -4, "--ctx"),
        ("prefill_chunk", 0, "--prefill-chunk"),
        ("read_workers", 0, "--read-workers"),
        ("read_workers", 65, "--read-workers"),
        ("ram", 0, "--ram"),
        ("ram", -1, "--ram"),
    ],
)
def test_bad_engine_values_name_their_flag(name: str, value: Any, flag: str) -> None:
    with pytest.raises(UsageError, match=f"^{flag}"):
        EngineSettings(**{name: value})


def test_unknown_device_lists_the_devices() -> None:
    with pytest.raises(UsageError, match="--device mps: there is none yet; use --device cpu"):
        EngineSettings(device="mps")
    with pytest.raises(UsageError, match=r"--device: 'tpu' is not one of auto, cpu"):
        EngineSettings(device="tpu")


def test_good_engine_values() -> None:
    settings = EngineSettings(
        model="org/name", device="cpu", ram=GIB, residency=1, context_tokens=2, prefill_chunk=1, read_workers=64,
        experts_dir=Path("packs"),
    )  # fmt: skip
    assert dataclasses.replace(settings, residency=0.001).residency == 0.001
    assert EngineSettings() == EngineSettings(model="demo", device="auto", ram=None, residency=None)


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingSettings().seed = 3  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineSettings().ram = 3  # type: ignore[misc]
    assert SamplingSettings().max_new_tokens == DEFAULT_MAX_NEW_TOKENS

"""The table of families: complete, the same as the page in the manual, and what the tests see.

The facts of each family are compared in :mod:`tests.model.test_bit_exact`, which runs them all.
"""

from __future__ import annotations

import pytest

from offload.catalogue import load_catalogue
from run_local import main
from tests.families import PAGE, page_with, published_models, transformers_version, untested
from tests.gguf_models import GGUF_MODELS
from tests.published_families import PUBLISHED, WORDS, formats_of
from tests.published_models import FORMATS
from tests.tiny_models import TINY_ARCHITECTURES

CATALOGUE = load_catalogue()
ANEW = "python -m tests.families writes it anew"


def test_every_family_that_is_tested_is_in_it() -> None:
    assert [family.name for family in CATALOGUE.families] == sorted(TINY_ARCHITECTURES), ANEW


def test_families_of_this_transformers_that_are_not_tested() -> None:
    """A release that brings or drops one shows here by name."""
    assert transformers_version() == CATALOGUE.transformers, ANEW
    assert untested() == CATALOGUE.untested, ANEW


@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
def test_published_models_and_formats(name: str) -> None:
    family = CATALOGUE.family(name)
    assert (family.models, family.formats) == (published_models(name), formats_of(name)), ANEW


def test_no_tested_format_is_left_out() -> None:
    told = {(family.name, form.rstrip("*")) for family in CATALOGUE.families for form in family.formats}
    assert told >= {(family, WORDS[name]) for name, families in PUBLISHED.items() for family in families}
    through = {(family.name, form) for family in CATALOGUE.families for form in family.formats if form[-1] != "*"}
    architectures = {form.architecture for form in FORMATS.values()}
    assert {name for name, _ in through} == architectures | {model.architecture for model in GGUF_MODELS.values()}


def test_the_page_is_the_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert CATALOGUE.markdown() in text and page_with(CATALOGUE) == text, ANEW


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--families"]) == 0
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert len(lines) == 1 + len(CATALOGUE.families)
    (mixtral,) = (line for line in lines if line.startswith("mixtral "))
    assert "MixtralForCausalLM" in mixtral and "Mixtral 8x7B (46.7 B)" in mixtral and "w1, w3, w2" in mixtral
    assert "not tested" in told.err
    assert main(["models", "--families", "--remove", "x"]) == 2

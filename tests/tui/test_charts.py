"""Charts as text and as a picture."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from tui.charts import Curve, bar, curves, spark
from tui.svg import curves_svg

TWO = [
    Curve("lru <layer>", ((0.125, 0.5), (0.25, 0.7), (0.5, 0.9))),
    Curve("belady", ((0.125, 0.6), (0.25, 0.8), (0.5, 0.9)), dashed=True),
]


@pytest.mark.parametrize(("value", "text"), [(0, ""), (1, "████"), (0.5, "██"), (0.25 + 1 / 32, "█▏"), (9, "████")])
def test_bars(value: float, text: str) -> None:
    assert bar(value, 1, 4) == text


def test_bars_of_nothing_and_sparks() -> None:
    assert bar(1, 0, 4) == ""
    assert spark([0.0, None, 0.5, 1.0, 2.0], 1.0) == "▁.▅██"


def test_curves_as_text() -> None:
    text = curves(TWO, width=40, height=9)
    lines = text.splitlines()
    assert lines[0].startswith("90.0 % ┤") and lines[0].endswith("a"), "of curves that meet, the first is shown"
    assert lines[8].startswith("50.0 % ┤a")
    assert "12.5 %" in lines[10] and lines[10].endswith("50 %")
    assert "a lru <layer>   b belady" in text and ":" in text and "·" in text
    assert max(map(len, lines)) <= 8 + 40 + 2


def test_curves_of_one_size_or_none() -> None:
    assert curves([]) == ""
    assert curves([Curve("-", ((0.5, 0.5),))]).count("a") == 2, "the point and its legend"


def test_the_picture_is_xml_with_every_curve() -> None:
    root = ET.fromstring(curves_svg(TWO, title="a & b", x_label="x", y_label="y"))
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{space}polyline")) == 2 and len(root.findall(f"{space}circle")) == 6
    texts = [one.text for one in root.findall(f"{space}text")]
    assert {"a & b", "lru <layer>", "belady", "12.5 %", "50 %"} <= set(texts)
    ET.fromstring(curves_svg([Curve("a", ((0.5, 0.5),))], title="", x_label="", y_label=""))

"""Markdown that grows: in whatever pieces it comes, the blocks are those of the whole."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from tui.app.blocks import LONGEST_TAIL, Block, GrowingMarkdown, cut_listings, split_blocks

TEXT = """# Title

A paragraph with **bold**
and a second line.

- one
- two

  still two

```python
def f():

    return "```"
```

| a | b |
| - | - |
| 1 | 2 |

1. first
2. second

> quoted

~~~
tildes
~~~
The end."""


def grow(text: str, cuts: list[int]) -> tuple[list[Block], list[Block]]:
    growing, settled, start = GrowingMarkdown(), [], 0
    for end in [*sorted(cuts), len(text)]:
        settled += growing.add(text[start:end])
        start = end
    return settled, growing.tail()


def joined(blocks: list[Block]) -> list[tuple[str, str | None]]:
    """The blocks, with pieces put together again."""
    whole: list[tuple[str, str | None]] = []
    for block in blocks:
        if block.first or not whole:
            whole.append((block.source, block.language))
        else:
            whole[-1] = (whole[-1][0] + "\n" + block.source, block.language)
    return whole


@given(st.lists(st.integers(0, len(TEXT)), max_size=30))
def test_pieces_give_the_blocks_of_the_whole(cuts: list[int]) -> None:
    settled, tail = grow(TEXT, cuts)
    assert [*settled, *tail] == split_blocks(TEXT)


def test_a_listing_is_bare_code_with_its_language() -> None:
    blocks = split_blocks(TEXT)
    assert Block('def f():\n\n    return "```"', "python") in blocks
    assert Block("tildes", "") in blocks
    assert split_blocks("```c\nint x;")[0] == Block("int x;", "c")
    assert split_blocks("") == split_blocks("\n \n") == []


def test_long_blocks_are_settled_in_pieces() -> None:
    code = "\n".join(f"x = {number}" for number in range(1000))
    rows = "\n".join(f"- item {number}" for number in range(1000))
    for text, language in ((f"```python\n{code}\n```\nend\n", "python"), (rows, None)):
        growing, settled = GrowingMarkdown(), []
        for line in text.splitlines(keepends=True):
            settled += growing.add(line)
            size = sum(len(block.source.splitlines()) for block in growing.tail())
            assert size <= LONGEST_TAIL + 1
        whole = joined([*settled, *growing.tail()])
        assert whole[0] == ((code, "python") if language else (rows, None))


@given(st.integers(1, 700), st.integers(1, 100))
def test_cut_listings_lose_nothing(lines: int, longest: int) -> None:
    code = "\n".join(str(number) for number in range(lines))
    pieces = cut_listings([Block("text"), Block(code, "c")], longest)
    assert joined(pieces) == [("text", None), (code, "c")]
    assert all(len(piece.source.split("\n")) <= longest for piece in pieces)


def test_settling_costs_no_more_at_the_end() -> None:
    growing = GrowingMarkdown()
    for number in range(500):
        growing.add(f"Paragraph {number}\n\n")
        assert len(growing.tail()) <= 1
    assert not re.search(r"Paragraph 1\b", growing._tail)

"""Messages of one line and of several, and the keys that end them."""

from __future__ import annotations

import pytest

from tests.tui.helpers import RecordedScreen, scripted_reader
from tui.prompt import Entry


@pytest.mark.parametrize(
    ("lines", "entry"),
    [
        (["hello"], Entry("hello")),
        (["", "   ", "hello"], Entry("hello")),
        (["one\\", "two\\", "three"], Entry("one\ntwo\nthree")),
        (["/system a\\", "b"], Entry("/system a\nb")),
        (['"""', "one", "", "  two", '"""'], Entry("one\n\n  two", verbatim=True)),
        (['"""one', 'two"""'], Entry("one\ntwo", verbatim=True)),
        (['  """one""" '], Entry("one", verbatim=True)),
        (['"""', "/help", '"""'], Entry("/help", verbatim=True)),
        (['"""', '"""', "after an empty block"], Entry("after an empty block")),
        (['say """ and go'], Entry('say """ and go')),
    ],
)
def test_messages(lines: list[str], entry: Entry) -> None:
    assert scripted_reader(RecordedScreen(), lines).read() == entry


def test_ctrl_c_on_an_empty_line_leaves() -> None:
    with pytest.raises(KeyboardInterrupt):
        scripted_reader(RecordedScreen(), [KeyboardInterrupt(), "never"]).read()


def test_ctrl_c_drops_what_was_typed() -> None:
    assert scripted_reader(RecordedScreen(), [KeyboardInterrupt(), "next"], typed="half").read() == Entry("next")


def test_ctrl_c_drops_an_unfinished_message() -> None:
    assert scripted_reader(RecordedScreen(), ["one\\", KeyboardInterrupt(), "next"]).read() == Entry("next")


def test_ctrl_d_in_an_unfinished_message_says_that_it_was_not_sent() -> None:
    screen = RecordedScreen()
    with pytest.raises(EOFError):
        scripted_reader(screen, ['"""one']).read()
    assert "the unfinished message was not sent" in screen.err


def test_a_line_that_is_no_utf_8_is_said_and_asked_again() -> None:
    screen = RecordedScreen()
    broken = UnicodeDecodeError("utf-8", b"ab\xff", 2, 3, "invalid start byte")
    assert scripted_reader(screen, [broken, "next"]).read() == Entry("next")
    assert "not valid UTF-8 at byte 2" in screen.err

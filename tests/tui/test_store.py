"""Conversations on disk: what a crash at any byte can lose, and what no other chat may do meanwhile."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.config import SamplingSettings
from offload.errors import RunLocalError, UsageError
from offload.events import Done, FinishReason
from tests.tui.fake_engine import run_stats
from tui.conversation import Turn
from tui.session import Session
from tui.store import Store, conversations_folder, read_saved


def done(text: str, reason: FinishReason = "stop") -> Done:
    return Done(reason, text, 3, 2, run_stats(), "the disk is gone" if reason == "error" else None)


def talk(folder: Path, *answers: Done) -> Session:
    session = Session(Store(folder), SamplingSettings(), "be brief")
    session.set_model("fake")
    for number, answer in enumerate(answers):
        session.ask(f"question {number}")
        session.end(answer)
    return session


def file_of(folder: Path) -> Path:
    return next(folder.glob("*.jsonl"))


def test_what_was_said_is_read_back(tmp_path: Path) -> None:
    session = talk(tmp_path, done("one"), done("two", "length"))
    session.set_title("a talk")
    session.close()
    saved = read_saved(file_of(tmp_path))
    assert saved.conversation.turns == [Turn("question 0", "one", "stop"), Turn("question 1", "two", "length")]
    assert (saved.model, saved.name, saved.conversation.system) == ("fake", "a talk", "be brief")


@pytest.mark.parametrize(
    ("saved", "answer", "reasoning"),
    [
        ("<think>\nTwo and two.\n</think>\n\nIt is 4.", "It is 4.", "Two and two."),
        ("\n<think>a</think>b <think>c</think>", "b <think>c</think>", "a"),
        ("<think>\nstopped here", "", "stopped here"),
        ("The tag <think> opens, </think> closes.", "The tag <think> opens, </think> closes.", ""),
        ("no tags", "no tags", ""),
    ],
)
def test_reasoning_in_files_of_older_versions_is_told_apart(
    saved: str, answer: str, reasoning: str, tmp_path: Path
) -> None:
    talk(tmp_path, done(saved, "cancelled"), done("two")).close()
    first, second = read_saved(file_of(tmp_path)).conversation.turns
    assert (first.answer, first.reasoning) == (answer, reasoning)
    assert (second.answer, second.reasoning) == ("two", "")


def test_tags_of_a_reply_after_its_reasoning_are_its_own(tmp_path: Path) -> None:
    talk(tmp_path, replace(done("<think> is a tag</think>"), reasoning="so")).close()
    (turn,) = read_saved(file_of(tmp_path)).conversation.turns
    assert (turn.answer, turn.reasoning) == ("<think> is a tag</think>", "so")


def test_reasoning_is_read_back(tmp_path: Path) -> None:
    session = talk(tmp_path, replace(done("one"), reasoning="so"))
    session.ask("question 1")
    session.part("", "well, ")
    session.part("tw", "well")
    session.close()  # as after a kill: the answer has no end
    first, second = read_saved(file_of(tmp_path)).conversation.turns
    assert (first.answer, first.reasoning) == ("one", "so")
    assert (second.answer, second.reasoning) == ("tw", "well, well")


def test_nothing_is_written_before_the_first_question(tmp_path: Path) -> None:
    talk(tmp_path / "conversations").close()
    assert not (tmp_path / "conversations").exists()


def test_only_the_user_may_read_them(tmp_path: Path) -> None:
    talk(tmp_path / "conversations", done("one")).close()
    assert file_of(tmp_path / "conversations").stat().st_mode & 0o077 == 0
    assert (tmp_path / "conversations").stat().st_mode & 0o077 == 0


def test_failed_and_cancelled_answers_are_no_turns(tmp_path: Path) -> None:
    session = talk(tmp_path, done("one"), done("half", "error"), done("", "cancelled"), done("part", "cancelled"))
    assert [turn.answer for turn in session.conversation.turns] == ["one", "part"]
    session.close()
    assert read_saved(file_of(tmp_path)).conversation.turns == session.conversation.turns


def test_retry_edit_and_clear_are_followed(tmp_path: Path) -> None:
    session = talk(tmp_path, done("one"), done("two"))
    question, base = session.conversation.last_question() or ("", [])
    session.ask(question, base)
    session.end(done("better"))
    assert session.cut_last() == "question 1"
    session.ask("another")
    session.end(done("three"))
    session.close()
    saved = read_saved(file_of(tmp_path)).conversation
    assert [(turn.question, turn.answer) for turn in saved.turns] == [("question 0", "one"), ("another", "three")]
    session = talk(tmp_path / "second", done("one"))
    session.clear()
    session.close()
    assert read_saved(file_of(tmp_path / "second")).conversation.turns == []


def test_an_answer_is_written_while_it_comes(tmp_path: Path) -> None:
    now = [0.0]
    session = Session(Store(tmp_path), SamplingSettings(), clock=lambda: now[0])
    session.ask("hi")
    for text in ("some ", "more ", "text"):
        now[0] += 0.6
        session.part(text)
    turn = read_saved(file_of(tmp_path)).conversation.turns[0]  # as after a kill
    assert turn == Turn("hi", "some more ", "cancelled")


@given(st.integers(0, 100))
def test_a_file_cut_anywhere_loses_only_its_end(cut: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        session = talk(folder, done("one"), done("two"), done("three"))
        session.close()
        path, whole = file_of(folder), session.conversation.turns
        content = path.read_bytes()
        first = content.index(b"\n") + 1
        path.write_bytes(content[: first + (len(content) - first) * cut // 100])
        turns = read_saved(path).conversation.turns
        assert turns == whole[: len(turns)]
        again = Session(Store(folder), SamplingSettings())
        again.resume(path)
        again.ask("and then?")
        again.end(done("this"))
        again.close()
        assert read_saved(path).conversation.turns == [*turns, Turn("and then?", "this", "stop")]
        for line in path.read_bytes().splitlines()[-2:]:
            json.loads(line)


def test_a_conversation_is_open_in_one_chat_only(tmp_path: Path) -> None:
    session = talk(tmp_path, done("one"))
    other = Session(Store(tmp_path), SamplingSettings())
    for action in (other.resume, lambda path: Store(tmp_path).delete(path.stem)):
        with pytest.raises(RunLocalError, match="open in another chat"):
            action(file_of(tmp_path))
    session.close()
    other.resume(file_of(tmp_path))
    assert other.conversation.turns
    other.close()


def test_listing_searching_and_deleting(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.list() == []
    with pytest.raises(UsageError, match="no conversation to go on with"):
        store.latest()
    ids = []
    for words in ("about Cats", "about dogs"):
        session = Session(store, SamplingSettings())
        session.ask(words)
        session.end(done(f"answer {words}"))
        ids.append(session.id or "")
        session.close()
    (tmp_path / "garbage.jsonl").write_text("nothing\n")
    assert {saved.id for saved in store.list()} == set(ids)
    assert [saved.id for saved in store.list("ANSWER cats")] == [ids[0]]
    assert store.list("cats dogs") == []
    with pytest.raises(UsageError, match="more than one conversation begins with '2"):
        store.find("2")
    with pytest.raises(UsageError, match="there is no conversation"):
        store.find("x")
    assert store.delete(ids[0]).name == "about Cats"
    assert [saved.id for saved in store.list()] == [ids[1]]


def test_a_disk_that_cannot_be_written_ends_the_saving_and_not_the_talk(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    problems: list[str] = []
    session = Session(Store(tmp_path / "file" / "folder"), SamplingSettings(), on_problem=problems.append)
    for number in range(2):
        session.ask(f"question {number}")
        session.end(done("one"))
    assert len(session.conversation.turns) == 2
    assert len(problems) == 1 and "is not saved" in problems[0]


def test_the_folder_follows_the_xdg_rules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert conversations_folder() == tmp_path / "run-local" / "conversations"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert conversations_folder() == tmp_path / "home" / ".local" / "share" / "run-local" / "conversations"


def test_turns_that_do_not_fit_stay_in_the_conversation_and_not_in_the_prompt(tmp_path: Path) -> None:
    session = talk(tmp_path, done("one"), done("two"), done("three"))
    session.forget(2)
    kept, _ = session.ask("more")
    assert [turn.answer for turn in kept] == ["three"]
    session.end(done("four"))
    assert len(session.conversation.turns) == 4
    session.close()

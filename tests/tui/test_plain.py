"""The plain chat: what goes where, what is kept, and what happens when something goes wrong."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from offload.config import SamplingSettings
from offload.errors import ContextError, RunLocalError, UsageError
from tests.tui.fake_engine import Answer
from tests.tui.helpers import make_chat, roles, scripted_reader


def interrupt(at: int, times: int = 1) -> Callable[[int], None]:
    """Ctrl-C after token ``at``, as the kernel would send it."""

    def on_token(index: int) -> None:
        if index == at:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    return on_token


def test_answer_goes_to_stdout_and_the_rest_to_stderr() -> None:
    chat, _, screen = make_chat(Answer(("A fine", " answer.")))
    assert chat.answer_once("hello there") == 0
    assert screen.out == "A fine answer.\n"
    assert screen.err == (
        "12.3 tokens/s | first token 0.25 s | hit rate 70.0 % (session 70.0 %) | read 2.5 MB a token | "
        "RSS 1.00 GiB of 2.00 GiB | context 4 of 1000\n"
    )


def test_reasoning_goes_to_stderr_and_stays_with_its_turn() -> None:
    chat, engine, screen = make_chat(Answer(("well, ", "well", "four"), thoughts=2))
    for question in ("hello", "again"):
        chat.answer_once(question)
    assert screen.out == "four\nfour\n"
    assert screen.err.startswith("well, well\n\n12.3 tokens/s")
    assert engine.prompts[1][1] == {"role": "assistant", "content": "four", "reasoning_content": "well, well"}  # type: ignore[index]


def test_an_answer_stopped_while_it_thought_is_no_turn() -> None:
    chat, _, screen = make_chat(Answer(("well, ", "well", "four"), thoughts=2, on_token=interrupt(0)))
    chat.answer_once("hello")
    assert "stopped before the answer began\n" in screen.err
    assert not chat.conversation.turns


def test_figures_that_were_not_measured_are_dashes() -> None:
    chat, engine, screen = make_chat()
    engine.measured = False
    chat.answer_once("hello")
    assert "- tokens/s | first token - | hit rate - (session -) | read - a token |" in screen.err


def test_an_answer_that_ends_its_line_gets_no_second_line_feed() -> None:
    chat, _, screen = make_chat(Answer(("line\n",)))
    chat.answer_once("hello")
    assert screen.out == "line\n"


def test_an_empty_answer_writes_nothing() -> None:
    chat, _, screen = make_chat(Answer(()))
    assert chat.answer_once("hello") == 0
    assert screen.out == ""


def test_text_held_back_until_the_end_is_shown() -> None:
    chat, _, screen = make_chat(Answer(("an answer",), held_back=" EN"))
    chat.answer_once("hello")
    assert screen.out == "an answer EN\n"
    assert chat.conversation.turns[0].answer == "an answer EN"


def test_turns_alternate_after_the_system_prompt() -> None:
    chat, engine, _ = make_chat(system="be brief")
    chat.ask("one")
    chat.ask("two")
    assert [roles(prompt) for prompt in engine.prompts] == ["su", "suau"]


@pytest.mark.parametrize(("tokens", "reason"), [(2, "--max-new-tokens 2"), (1, "the context is full (--ctx)")])
def test_a_cut_answer_says_why(tokens: int, reason: str) -> None:
    chat, _, screen = make_chat(Answer(("x",) * tokens, reason="length"), sampling=SamplingSettings(max_new_tokens=2))
    assert chat.answer_once("hello") == 0
    assert f"cut off: {reason}\n" in screen.err


def test_ctrl_c_stops_the_answer_and_keeps_it() -> None:
    chat, engine, screen = make_chat(Answer(("first", " second", " third"), on_token=interrupt(0)), Answer())
    assert chat.answer_once("hello") == 130
    assert (screen.out, "stopped\n" in screen.err) == ("first\n", True)
    assert [(turn.answer, turn.finish_reason) for turn in chat.conversation.turns] == [("first", "cancelled")]
    chat.ask("go on")
    assert roles(engine.prompts[-1]) == "uau"
    assert engine.prompts[-1][1]["content"] == "first"  # type: ignore[index]


def test_the_second_ctrl_c_leaves() -> None:
    chat, _, screen = make_chat(Answer(("first", " second"), on_token=interrupt(0, times=2)))
    with pytest.raises(KeyboardInterrupt):
        chat.ask("hello")
    assert screen.out == "first\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_cancel_before_the_first_token_is_no_turn() -> None:
    chat, engine, screen = make_chat(Answer((), waits=True), Answer())
    generate = engine.generate

    def cancelled_at_once(prompt, sampling):  # type: ignore[no-untyped-def]
        events = generate(prompt, sampling)
        signal.raise_signal(signal.SIGINT)
        return events

    engine.generate = cancelled_at_once  # type: ignore[method-assign]
    assert chat.ask("hello").reason == "cancelled"
    engine.generate = generate  # type: ignore[method-assign]
    assert "stopped before the first token\n" in screen.err
    assert chat.conversation.turns == []
    last = chat.conversation.last_question()
    assert last == ("hello", [])
    chat.ask(*last)
    assert roles(engine.prompts[-1]) == "u"
    assert len(chat.conversation.turns) == 1


def test_an_interrupt_that_the_engine_lost_is_repeated() -> None:
    chat, engine, _ = make_chat(Answer(("a", "b", "c")))
    generate = engine.generate

    def interrupted_before_the_flag_is_cleared(prompt, sampling):  # type: ignore[no-untyped-def]
        signal.raise_signal(signal.SIGINT)
        return generate(prompt, sampling)

    engine.generate = interrupted_before_the_flag_is_cleared  # type: ignore[method-assign]
    assert chat.ask("hello").reason == "cancelled"


def test_an_error_is_no_turn_and_can_be_retried() -> None:
    chat, engine, screen = make_chat(Answer(("half",), error="a record cannot be read"), Answer())
    assert chat.answer_once("hello") == 1
    assert "error: a record cannot be read\n" in screen.err
    assert screen.out == "half\n"
    assert chat.conversation.turns == []
    assert chat.conversation.last_question() == ("hello", [])
    chat.ask("hello")
    assert roles(engine.prompts[-1]) == "u"


def test_the_oldest_turns_go_when_the_context_is_full() -> None:
    chat, engine, screen = make_chat(system="system prompt", context_tokens=16)
    for question in ("one two three", "four five six", "seven eight nine ten"):  # answers are 1 word
        chat.ask(question)
    assert "dropped" not in screen.err
    chat.ask("eleven twelve")
    assert "the context is full: the oldest turn was dropped\n" in screen.err
    assert roles(engine.prompts[-1]) == "suauau"
    assert engine.prompts[-1][1]["content"] == "four five six"  # type: ignore[index]
    assert chat.conversation.turns[0].question == "four five six"
    chat.ask("a b c d e f g h i j k")
    assert "the 3 oldest turns were dropped\n" in screen.err
    assert roles(engine.prompts[-1]) == "su"


def test_a_question_that_cannot_fit_alone_is_refused_and_nothing_is_lost() -> None:
    chat, _, screen = make_chat(context_tokens=8)
    chat.ask("one")
    with pytest.raises(ContextError, match="does not fit the context, even without the turns before it: 9 tokens of 8"):
        chat.ask("1 2 3 4 5 6 7 8 9")
    assert [turn.question for turn in chat.conversation.turns] == ["one"]
    assert "dropped" not in screen.err


def test_each_answer_has_its_own_seed_so_that_a_retry_differs() -> None:
    chat, engine, _ = make_chat(sampling=SamplingSettings(seed=2**63 - 1))
    chat.ask("one")
    chat.ask("two")
    assert [sampling.seed for sampling in engine.samplings] == [2**63 - 1, 0]


def test_without_a_seed_every_answer_draws_one() -> None:
    chat, engine, _ = make_chat()
    chat.ask("one")
    assert engine.samplings[0].seed is None


def test_an_interactive_chat_goes_on_after_errors() -> None:
    answers = Answer(raises=UsageError("no chat template")), Answer(error="disk"), Answer(("good",))
    chat, _, screen = make_chat(*answers)
    assert chat.talk(scripted_reader(screen, ["one", "two", "three"])) == 0
    assert screen.out.endswith("good\n")
    assert screen.err.count("error:") == 2


def test_one_question_that_cannot_be_asked_raises() -> None:
    chat, _, _ = make_chat(Answer(raises=RunLocalError("no")))
    with pytest.raises(RunLocalError):
        chat.answer_once("one")


def test_ctrl_c_at_the_empty_prompt_leaves_with_130() -> None:
    chat, _, screen = make_chat()
    assert chat.talk(scripted_reader(screen, [KeyboardInterrupt(), "never"])) == 130


def test_a_doubled_slash_sends_one() -> None:
    chat, engine, screen = make_chat()
    chat.talk(scripted_reader(screen, ["//etc is what?", '"""/etc', '"""']))
    assert [prompt[-1]["content"] for prompt in engine.prompts] == ["/etc is what?", "/etc"]  # type: ignore[index]


def test_sigint_that_the_shell_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        chat, engine, _ = make_chat(Answer(("a", "b"), on_token=interrupt(0)))
        assert chat.ask("hello").reason == "stop"
        assert engine.cancels == 0
    finally:
        signal.signal(signal.SIGINT, before)

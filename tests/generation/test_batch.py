"""Batches with a scripted engine: one output row for each input row, whatever the input is."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from offload.config import EngineSettings, SamplingSettings
from offload.errors import ModelError, RunLocalError, UsageError
from offload.events import BatchProgress
from offload.generation.batch import parse_row, row_seed
from offload.generation.batch_files import (
    BatchInput,
    BatchOutput,
    StandardOutput,
    batch_settings,
    choose_seed,
    open_sink,
    settings_path,
)
from offload.generation.batch_run import BatchOptions, BatchSummary, run_batch
from tests.tui.fake_engine import Answer, FakeEngine

SAMPLING = SamplingSettings(temperature=0.5, max_new_tokens=9)


class Rows:
    """A sink in memory."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []

    def write(self, line: bytes) -> None:
        assert line.endswith(b"\n") and line.count(b"\n") == 1
        self.lines.append(line)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]


def batch(text: str | bytes, *answers: Answer, **options: Any) -> tuple[BatchSummary, list[dict[str, Any]], FakeEngine]:
    engine = options.pop("engine", None) or FakeEngine(answers or (Answer(),), context_tokens=20)
    sink = Rows()
    data = text if isinstance(text, bytes) else text.encode()
    summary = run_batch(engine, io.BytesIO(data), sink, SAMPLING, 7, **options)
    return summary, sink.rows, engine


def test_rows_come_out_in_order_with_all_their_fields() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    text = json.dumps({"id": "a", "prompt": "one two"}) + "\n\n \n" + json.dumps({"id": 2, "messages": messages})
    summary, rows, engine = batch(text, Answer(("x", "y")), Answer(("\u00e9\U0001f600",), reason="length"))
    counts = {"prompt_tokens": 2, "error": None, "reasoning": None}
    assert rows == [
        {"id": "a", "text": "xy", "finish_reason": "stop", "new_tokens": 2} | counts,
        {"id": 2, "text": "\u00e9\U0001f600", "finish_reason": "length", "new_tokens": 1} | counts,
    ]
    assert engine.prompts == ["one two", messages]
    assert summary == BatchSummary(skipped=0, written=2, errors=0, new_tokens=3, interrupted=False)


def test_reasoning_is_a_field_of_its_own() -> None:
    """Of the answer, and of an earlier answer in the input."""
    messages = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a", "reasoning_content": "r"},
        {"role": "user", "content": "v"},
    ]
    _, rows, engine = batch(json.dumps({"messages": messages}), Answer(("so ", "it is", "four"), thoughts=2))
    assert (rows[0]["text"], rows[0]["reasoning"], rows[0]["new_tokens"]) == ("four", "so it is", 3)
    assert engine.prompts == [messages]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"{", "not valid JSON: Expecting property name"),
        (b"[1]", "no JSON object"),
        (b"nonsense", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON: RecursionError"),
        (b'{"id": 1, "prompt": "x", "top_k": ' + b"9" * 5000 + b"}", "not valid JSON: ValueError"),
        (b'{"prompt": "caf\xe9"}', "not valid UTF-8 at byte 15 of the line"),
        (b"{}", "exactly one of 'prompt' and 'messages'"),
        (b'{"prompt": "x", "messages": []}', "exactly one of"),
        (b'{"prompt": ""}', "prompt: is empty"),
        (b'{"prompt": " \\n"}', "prompt: is empty"),
        (b'{"prompt": 5}', "prompt: must be a string"),
        (b'{"prompt": null}', "prompt: must be a string"),
        (b'{"prompt": "\\ud800"}', "prompt: holds half of a surrogate pair"),
        (b'{"messages": []}', "messages: must be a list"),
        (b'{"messages": ["x"]}', "messages[0]: must be an object"),
        (b'{"messages": [{"role": "user"}]}', "messages[0]: must be an object"),
        (b'{"messages": [{"role": "king", "content": "x"}]}', "messages[0]: the role must be one of"),
        (b'{"messages": [{"role": ["user"], "content": "x"}]}', "messages[0]: the role must be one of"),
        (b'{"messages": [{"role": "user", "content": " "}]}', "messages[0].content: is empty"),
        (b'{"messages": [{"role": "assistant", "content": ""}]}', "the last one must have the role 'user'"),
        (b'{"prompt": "x", "topk": 3, "\\ud800": 1}', "unknown fields: 'topk', '\\ud800'; known are id, "),
        (b'{"prompt": "x", "top_k": 1.5}', "top_k: '1.5' is not a whole number"),
        (b'{"prompt": "x", "top_p": 7}', "top_p must be above 0"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature: 'nan' is not a number"),
        (b'{"prompt": "x", "temperature": 1' + b"0" * 400 + b"}", "is not a number"),
        (b'{"prompt": "x", "temperature": true}', "temperature: 'True' is not a number"),
        (b'{"prompt": "x", "top_k": 99999999999999999999}', "top_k: the number is too large"),
        (b'{"prompt": "x", "max_new_tokens": null}', "max_new_tokens must be at least 1"),
        (b'{"prompt": "x", "stop": [1]}', "stop: every stop string"),
        (b'{"prompt": "x", "stop": ["\\ud800"]}', "stop: holds half of a surrogate pair"),
        (b'{"id": true, "prompt": "x"}', "id: must be a string or a whole number"),
        (b'{"id": 1.5, "prompt": "x"}', "id: must be a string or a whole number"),
        (b'{"id": "\\ud800", "prompt": "x"}', "id: holds half of a surrogate pair"),
        (b'{"prompt": "' + b"x " * 30 + b'"}', "30 tokens, but only 20 fit"),
    ],
    ids=lambda value: value[:30] if isinstance(value, bytes) else "",
)
def test_a_bad_row_becomes_an_error_row_and_the_next_one_runs(line: bytes, error: str) -> None:
    summary, rows, engine = batch(line + b'\n{"id": "next", "prompt": "x"}\n')
    assert error in rows[0]["error"]
    assert (rows[0]["text"], rows[0]["finish_reason"], rows[0]["new_tokens"]) == (None, "error", None)
    assert rows[0]["id"] in ("line-1", 1)
    assert (rows[1]["id"], rows[1]["error"]) == ("next", None)
    assert (summary.written, summary.errors, len(engine.prompts)) == (2, 1, 1)


def test_ids_may_be_missing_and_must_not_repeat() -> None:
    lines = ['{"prompt": "x"}', "", '{"id": null, "prompt": "x"}', '{"id": "line-1", "prompt": "x"}']
    lines += ['{"id": 1, "prompt": "x"}', '{"id": "1", "prompt": "x"}', '{"id": 1, "prompt": "y"}']
    _, rows, _ = batch("\n".join(lines))
    assert [(row["id"], row["error"] is None) for row in rows] == [
        ("line-1", True),
        ("line-3", True),
        ("line-1", False),
        (1, True),
        ("1", True),
        (1, False),
    ]
    assert rows[-1]["error"] == "an earlier row has the same id"


def test_rows_override_sampling() -> None:
    row = {"id": 1, "prompt": "x", "temperature": None, "top_k": 3, "stop": "END", "max_new_tokens": 2, "seed": 11}
    _, _, engine = batch(json.dumps(row) + '\n{"prompt": "x", "stop": ["a", "b"]}')
    assert engine.samplings[0] == SamplingSettings(top_k=3, stop=("END",), max_new_tokens=2, seed=11)
    assert engine.samplings[1].stop == ("a", "b")
    assert engine.samplings[1].temperature == 0.5


def test_a_row_s_seed_depends_on_its_id_and_not_on_its_place() -> None:
    one = parse_row(b'{"id": "a", "prompt": "x"}', 1, SAMPLING, 7)
    other = parse_row(b'{"id": "a", "prompt": "x"}', 5, SAMPLING, 7)
    assert one.sampling == other.sampling
    assert one.sampling is not None and one.sampling.seed == row_seed(7, "a")
    assert len({row_seed(7, "a"), row_seed(7, "b"), row_seed(8, "a"), row_seed(7, 1), row_seed(7, "1")}) == 5
    assert row_seed(7, "a") == 4332168281626336527  # must never change: answers would


def test_errors_of_the_engine_become_error_rows() -> None:
    answers = Answer(("half",), error="disk"), Answer(raises=UsageError("no template")), Answer(("ok",))
    summary, rows, _ = batch('{"prompt": "x"}\n' * 3, *answers)
    assert [row["error"] for row in rows] == ["disk", "no template", None]
    assert (rows[0]["text"], rows[0]["new_tokens"]) == ("half", 1)
    assert summary.errors == 2


def test_a_bug_in_the_engine_is_not_hidden_in_a_row() -> None:
    with pytest.raises(ZeroDivisionError):
        batch('{"prompt": "x"}', Answer(raises=ZeroDivisionError()))


def test_a_cancelled_row_is_dropped_and_ends_the_batch() -> None:
    engine = FakeEngine()
    engine.answers = [Answer(), Answer(("a", "b", "c"), on_token=lambda index: engine.cancel())]
    summary, rows, _ = batch('{"prompt": "x"}\n' * 3, engine=engine)
    assert [row["id"] for row in rows] == ["line-1"]
    assert summary == BatchSummary(skipped=0, written=1, errors=0, new_tokens=2, interrupted=True)


def test_should_stop_finishes_the_running_row_and_starts_no_other() -> None:
    engine = FakeEngine([Answer(("a", "b"))])
    summary, rows, _ = batch('{"prompt": "x"}\n' * 3, engine=engine, should_stop=lambda: bool(engine.prompts))
    assert ([row["text"] for row in rows], summary.interrupted, engine.cancels) == (["ab"], True, 0)
    summary, rows, engine = batch('{"prompt": "x"}', should_stop=lambda: True)
    assert (rows, summary.interrupted, engine.prompts) == ([], True, [])
    engine = FakeEngine([Answer()])
    summary, rows, _ = batch('{"prompt": "x"}\n\n', engine=engine, should_stop=lambda: bool(engine.prompts))
    assert (len(rows), summary.interrupted) == (1, False)  # there was no other


def test_should_cancel_drops_the_running_row() -> None:
    seen: list[int] = []
    engine = FakeEngine([Answer(("a",), on_token=seen.append, waits=True)])
    summary, rows, _ = batch('{"prompt": "x"}\n' * 2, engine=engine, should_cancel=lambda: True)
    assert (rows, summary.interrupted, engine.cancels > 0) == ([], True, True)


def test_too_many_errors_end_the_batch() -> None:
    text = '{"prompt": "x"}\n{}\n{"prompt": "x"}\n[]\n{"prompt": "x"}\n'
    summary, rows, _ = batch(text, options=BatchOptions(max_errors=2))
    assert [row["id"] for row in rows] == ["line-1", "line-2", "line-3", "line-4"]
    assert (summary.gave_up, summary.failed, summary.interrupted) == (True, True, False)
    assert "stopped because of the errors" in summary.describe()
    assert not batch(text, options=BatchOptions(max_errors=3))[0].failed


def test_as_many_rows_of_an_id_are_skipped_as_were_done() -> None:
    text = '{"id": 1, "prompt": "x"}\n{"id": 2, "prompt": "x"}\n{"id": 1, "prompt": "y"}\n{"id": 3, "prompt": "x"}\n'
    summary, rows, _ = batch(text, done_before=Counter({"1": 1, "2": 1}))
    assert [(row["id"], row["error"]) for row in rows] == [(1, "an earlier row has the same id"), (3, None)]
    assert summary.skipped == 2
    assert batch(text, done_before=Counter({"1": 2, "2": 1}))[0].written == 1


def test_progress_counts_rows_and_tokens() -> None:
    seen: list[BatchProgress] = []
    ticks = iter(range(1000))
    batch('{"prompt": "x"}\n{}\n', on_progress=seen.append, rows_total=2, clock=lambda: next(ticks))
    assert seen[0] == BatchProgress(0, 2, 0, 0, 0, None, 0.7, running=1)
    assert max(progress.row_tokens for progress in seen) == 2
    last = seen[-1]
    assert (last.rows_done, last.errors, last.new_tokens, last.row_tokens, last.running) == (2, 1, 2, 0, 0)
    assert last.tokens_per_s is not None and last.tokens_per_s > 0
    assert (last.bytes_per_token, last.eta_s) == (500, 0)  # 1000 bytes for two tokens; no row is left


# The files.


@pytest.fixture
def source(tmp_path: Path) -> BatchInput:
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "x"}\n\n{"id": 2, "prompt": "y"}\n{"id": 3, "prompt": "z"}')
    return BatchInput.open(str(tmp_path / "in.jsonl"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def settings(model: str = "m", seed: int = 7, **sampling: Any) -> dict[str, Any]:
    return batch_settings(EngineSettings(model=model), SamplingSettings(**sampling), seed)


def run_files(source: BatchInput, out: Path, resume: bool = False, engine: FakeEngine | None = None) -> BatchSummary:
    with open_sink(out, resume, settings(), source) as sink:
        summary = run_batch(
            engine or FakeEngine(), source.lines(), sink, SAMPLING, 7, done_before=sink.done, rows_total=source.rows()
        )
        if not summary.interrupted:
            sink.finish()
    return summary


def ids(out: Path) -> list[object]:
    return [json.loads(line)["id"] for line in out.read_text().splitlines()]


def test_a_batch_into_a_file(source: BatchInput, out: Path) -> None:
    assert source.rows() == 3
    assert run_files(source, out).written == 3
    assert ids(out) == [1, 2, 3]
    saved = json.loads(settings_path(out).read_text())
    assert saved["input"]["bytes"] == (out.parent / "in.jsonl").stat().st_size
    assert (saved["model"], saved["seed"], saved["version"]) == ("m", 7, 1)


def test_an_existing_output_is_never_overwritten(source: BatchInput, out: Path) -> None:
    out.write_text("precious")
    with pytest.raises(UsageError, match="exists already; add --resume"):
        run_files(source, out)
    assert out.read_text() == "precious"
    assert not settings_path(out).exists()


@pytest.mark.parametrize("torn", [b"", b'{"id": 2, "te', b'{"id": 2, "text": "x"}'])
def test_resume_after_a_kill_cuts_a_torn_line_and_does_the_rest(source: BatchInput, out: Path, torn: bytes) -> None:
    run_files(source, out)
    first = out.read_bytes().splitlines(keepends=True)[0]
    out.write_bytes(first + torn)
    summary = run_files(source, out, resume=True)
    assert (summary.skipped, summary.written) == (1, 2)
    assert ids(out) == [1, 2, 3]
    assert out.read_bytes().startswith(first)


def test_resume_of_a_complete_batch_does_nothing(source: BatchInput, out: Path) -> None:
    run_files(source, out)
    engine = FakeEngine()
    assert run_files(source, out, resume=True, engine=engine).skipped == 3
    assert engine.prompts == []


def test_resume_without_an_output_starts_anew(source: BatchInput, out: Path) -> None:
    assert run_files(source, out, resume=True).written == 3


def test_an_error_row_that_was_removed_is_done_again(source: BatchInput, out: Path) -> None:
    run_files(source, out, engine=FakeEngine([Answer(error="disk"), Answer()]))
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(line for line in lines if '"error": null' in line))
    run_files(source, out, resume=True)
    assert ids(out) == [2, 3, 1]


def test_rows_may_be_added_to_the_input(source: BatchInput, out: Path) -> None:
    run_files(source, out)
    assert source.path is not None
    with open(source.path, "a") as file:
        file.write('\n{"id": 4, "prompt": "x"}\n')
    assert run_files(source, out, resume=True).written == 1
    assert ids(out) == [1, 2, 3, 4]


def test_a_changed_input_is_refused(source: BatchInput, out: Path) -> None:
    run_files(source, out)
    assert source.path is not None
    source.path.write_text(source.path.read_text().replace("x", "q"))
    before = out.read_bytes()
    with pytest.raises(UsageError, match="are not those that"):
        run_files(source, out, resume=True)
    assert out.read_bytes() == before


def test_other_settings_are_refused_by_name(source: BatchInput, out: Path) -> None:
    run_files(source, out)
    with pytest.raises(UsageError) as caught:
        open_sink(out, True, settings(model="n", seed=8, temperature=0.1), source)
    for part in ('model was "m" and is "n"', "seed was 7 and is 8", "temperature was null and is 0.1"):
        assert part in str(caught.value)
    assert "top_k" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        ("{", "cannot be read"),
        ("[]", "of another version"),
        ('{"version": 9}', "another version"),
    ],
)
def test_without_good_settings_there_is_no_resume(
    source: BatchInput, out: Path, content: str | None, message: str
) -> None:
    run_files(source, out)
    settings_path(out).unlink()
    if content is not None:
        settings_path(out).write_text(content)
    with pytest.raises(UsageError, match=message):
        run_files(source, out, resume=True)


@pytest.mark.parametrize("line", ["{}\n", "nonsense\n", '{"id": 1}\n', "\0\0\n", "5\n"])
def test_an_output_with_a_foreign_line_is_left_alone(source: BatchInput, out: Path, line: str) -> None:
    run_files(source, out)
    damaged = line + out.read_text()
    out.write_text(damaged)
    with pytest.raises(UsageError, match="line 1 is no output row of a batch"):
        run_files(source, out, resume=True)
    assert out.read_text() == damaged


def test_a_run_that_never_started_leaves_nothing(source: BatchInput, out: Path) -> None:
    with pytest.raises(ModelError), open_sink(out, False, settings(), source):
        raise ModelError("no such model")
    assert [path.name for path in out.parent.iterdir()] == ["in.jsonl"]


def test_an_empty_input_has_an_empty_output(tmp_path: Path, out: Path) -> None:
    (tmp_path / "empty").write_text("\n \n")
    assert run_files(BatchInput.open(str(tmp_path / "empty")), out).written == 0
    assert out.read_bytes() == b""


def test_two_runs_cannot_write_one_file(source: BatchInput, out: Path) -> None:
    with open_sink(out, False, settings(), source), pytest.raises(UsageError, match="another run is writing"):
        open_sink(out, True, settings(), source)
    run_files(source, out)


def test_a_full_disk_leaves_whole_rows_that_can_be_resumed(
    source: BatchInput, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = BatchOutput.create(out, settings(), source)
    with sink:
        sink.write(b'{"id": 1, "text": "", "finish_reason": "stop", "error": null}\n')
        file = sink._file

        class FullDisk:
            """Takes a few bytes and then none."""

            full = False

            def write(self, data: bytes) -> int:
                if self.full:
                    raise OSError(28, "No space left on device")
                self.full = True
                return file.write(data[:5])

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

        sink._file = FullDisk()  # type: ignore[assignment]
        with pytest.raises(RunLocalError, match=r"No space left on device\); .* --resume"):
            sink.write(b'{"id": 2}\n')
        assert out.read_bytes().count(b"\n") == 1 and out.read_bytes().endswith(b"\n")
        sink._file = file
    assert run_files(source, out, resume=True).written == 2


@pytest.mark.parametrize("name", ["missing.jsonl", ".", "a\0b"])
def test_an_input_that_cannot_be_read(name: str) -> None:
    with pytest.raises(UsageError):
        BatchInput.open(name)


def test_a_stream_cannot_be_resumed(out: Path) -> None:
    with pytest.raises(UsageError, match="not a stream"):
        open_sink(out, True, settings(), BatchInput.open("-"))
    with pytest.raises(UsageError, match="not standard output"):
        open_sink(None, True, settings(), BatchInput.open("-"))
    assert isinstance(open_sink(None, False, settings(), BatchInput.open("-")), StandardOutput)


def test_the_seed_is_given_or_that_of_the_run_before_or_new(source: BatchInput, out: Path) -> None:
    assert choose_seed(3, None) == 3
    assert choose_seed(None, None) != choose_seed(None, None)
    assert 0 <= choose_seed(None, out) < 2**63
    run_files(source, out)
    assert choose_seed(None, out) == 7


def test_a_model_s_folder_is_the_same_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert settings(model=".")["model"] == settings(model=str(tmp_path))["model"]

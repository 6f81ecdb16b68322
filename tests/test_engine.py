"""The engine as front ends see it: the stream of events, turns, cancel, errors, statistics and the trace."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.trace import DECODE, load_trace
from offload.checkpoint.expert_file import ExpertFile
from offload.config import EngineSettings, SamplingSettings
from offload.engine import Engine, open_engine, plan_model
from offload.errors import BudgetError, ContextError, ExpertFileError, ModelError, UsageError
from offload.events import Done, LoadProgress, Notice, PrefillProgress, Token
from tests.engines import GREEDY, finish, open_tiny
from tests.tiny_models import EOS_ID, build_tiny, load_reference

HELLO = [{"role": "user", "content": "Hello there, how are you?"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("qwen2_moe", tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packs")


@pytest.fixture
def engine(checkpoint: Path, packs: Path) -> Iterator[Engine]:
    with open_tiny(checkpoint, packs, residency=0.5) as opened:
        yield opened


def test_loading_is_told_to_its_end(checkpoint: Path, packs: Path) -> None:
    events: list[LoadProgress | Notice] = []
    open_engine(EngineSettings(model=str(checkpoint), context_tokens=128, experts_dir=packs), events.append).close()
    ends = {event.stage: event for event in events if isinstance(event, LoadProgress)}
    assert {"load", "slots"} <= ends.keys()
    assert all(end.done == end.total for end in ends.values())


@pytest.mark.parametrize("content", [None, "{"])
def test_a_checkpoint_without_its_tokenizer(content: str | None, checkpoint: Path, packs: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(
        ModelError, match=r"the tokenizer cannot be loaded \(.*\); fetch the tokenizer's files"
    ) as error:
        open_tiny(folder, packs)
    assert "\n" not in str(error.value)


def test_a_generation_is_prefill_then_tokens_then_done(engine: Engine) -> None:
    events, done = finish(engine.generate(HELLO, GREEDY))
    kinds = [type(event) for event in events]
    first_token = kinds.index(Token)
    assert all(kind is PrefillProgress for kind in kinds[:first_token])
    assert all(kind is Token for kind in kinds[first_token:-1])
    assert "".join(event.text for event in events if isinstance(event, Token)) == done.text
    assert done.reason in ("length", "stop")
    assert done.new_tokens <= 8


def test_greedy_text_equals_stock_generate(checkpoint: Path, engine: Engine) -> None:
    _, done = finish(engine.generate("Once upon a time", GREEDY))
    model, tokenizer = load_reference(checkpoint), engine._encoder.tokenizer
    ids = torch.tensor([tokenizer("Once upon a time")["input_ids"]])
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert done.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_the_same_tokens_at_any_residency_policy_and_number_of_workers(checkpoint: Path, packs: Path) -> None:
    texts = set()
    for settings in (
        {"residency": 1e-9},
        {"residency": 0.3, "policy": "lfu", "read_workers": 1},
        {"residency": 0.6, "policy": "ewma:half_life=2"},
        {"residency": 1.0, "read_workers": 16},
    ):
        with open_tiny(checkpoint, packs, **settings) as engine:
            texts.add(
                finish(engine.generate(HELLO, SamplingSettings(temperature=1.0, seed=5, max_new_tokens=20)))[1].text
            )
    assert len(texts) == 1


def test_prompts_are_prefilled_in_chunks(checkpoint: Path, packs: Path) -> None:
    with open_tiny(checkpoint, packs, prefill_chunk=10) as engine:
        events, done = finish(engine.generate("a" * 25, GREEDY))
    steps = [event.done for event in events if isinstance(event, PrefillProgress)]
    assert steps == [*range(0, done.prompt_tokens, 10), done.prompt_tokens]


def test_a_second_turn_keeps_the_first_in_the_kv_cache(engine: Engine) -> None:
    _, first = finish(engine.generate(HELLO, GREEDY))
    more = [*HELLO, {"role": "assistant", "content": first.text}, {"role": "user", "content": "And you?"}]
    events, second = finish(engine.generate(more, GREEDY))
    reused = next(event.reused for event in events if isinstance(event, PrefillProgress))
    assert reused >= first.prompt_tokens - 1
    assert second.stats.prompt_tokens > reused


def test_retry_gives_the_same_answer(engine: Engine) -> None:
    first = finish(engine.generate(HELLO, GREEDY))[1]
    assert finish(engine.generate(HELLO, GREEDY))[1].text == first.text


@pytest.mark.parametrize("architecture", ["qwen3_next", "gpt_oss", "jamba"])
def test_conversations_of_recurrent_and_sliding_models_go_on(architecture: str, tmp_path: Path) -> None:
    folder = build_tiny(architecture, tmp_path / "checkpoint")
    other = [{"role": "user", "content": "Something else entirely, and longer than the window."}]
    with open_tiny(folder, tmp_path / "packs", prefill_chunk=7) as engine:
        fresh = {str(m): finish(engine.generate(m, GREEDY))[1].text for m in (HELLO, other)}
        assert finish(engine.generate(HELLO, GREEDY))[1].text == fresh[str(HELLO)]
        assert finish(engine.generate(other, GREEDY))[1].text == fresh[str(other)]


def test_cancel_between_tokens_keeps_the_part_and_the_conversation(engine: Engine) -> None:
    whole = finish(engine.generate(HELLO, GREEDY))[1].text
    stream, shown = engine.generate(HELLO, GREEDY), ""
    for event in stream:
        if isinstance(event, Token):
            shown += event.text
            engine.cancel()
        if isinstance(event, Done):
            assert event.reason == "cancelled"
            assert event.text == shown
            assert event.new_tokens == 1
    assert finish(engine.generate(HELLO, GREEDY))[1].text == whole


def test_cancel_inside_a_prefill(checkpoint: Path, packs: Path) -> None:
    with open_tiny(checkpoint, packs, prefill_chunk=5, residency=1e-9) as engine:
        whole = finish(engine.generate(HELLO, GREEDY))[1].text
        engine._kv.reset()
        stream = engine.generate(HELLO, GREEDY)
        next(stream)
        engine.cancel()
        _, done = finish(stream)
        assert (done.reason, done.text, done.new_tokens) == ("cancelled", "", 0)
        assert finish(engine.generate(HELLO, GREEDY))[1].text == whole


def test_a_stream_that_is_dropped_leaves_the_engine_usable(engine: Engine) -> None:
    whole = finish(engine.generate(HELLO, GREEDY))[1].text
    stream = engine.generate(HELLO, GREEDY)
    for _ in range(3):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert finish(engine.generate(HELLO, GREEDY))[1].text == whole


def test_an_interrupt_in_the_middle_of_a_pass_leaves_the_engine_usable(engine: Engine) -> None:
    whole = finish(engine.generate(HELLO, GREEDY))[1].text

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    engine._kv.reset()
    hook = engine._model.model.layers[2].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(engine.generate(HELLO, GREEDY))
    hook.remove()
    assert finish(engine.generate(HELLO, GREEDY))[1].text == whole


def test_a_read_error_ends_the_answer_with_its_reason_and_not_the_engine(engine: Engine, monkeypatch: Any) -> None:
    whole = finish(engine.generate(HELLO, GREEDY))[1].text

    def broken(*args: object) -> int:
        raise ExpertFileError("experts.bin: reading the record of layer 1, expert 2 failed")

    engine._kv.reset()
    monkeypatch.setattr(ExpertFile, "read_into", broken)
    done = finish(engine.generate([{"role": "user", "content": "Other words"}], GREEDY))[1]
    assert done.reason == "error"
    assert done.error is not None and "layer 1, expert 2" in done.error
    monkeypatch.undo()
    assert finish(engine.generate(HELLO, GREEDY))[1].text == whole


def test_prompts_that_do_not_fit_are_refused_with_the_numbers(engine: Engine) -> None:
    with pytest.raises(ContextError, match="128") as caught:
        engine.generate("x" * 400, GREEDY)
    assert caught.value.prompt_tokens >= caught.value.context_tokens == 128


def test_a_full_context_ends_the_answer(engine: Engine) -> None:
    _, done = finish(engine.generate("abcdefgh" * 15, SamplingSettings(temperature=0, max_new_tokens=500)))
    assert done.reason in ("length", "stop")
    assert done.prompt_tokens + done.new_tokens <= 128


@pytest.mark.parametrize("prompt", ["", [], [{"role": "user", "content": "  "}], [{"role": "system", "content": "hi"}]])
def test_empty_prompts_are_refused(engine: Engine, prompt: Any) -> None:
    with pytest.raises(UsageError, match="empty"):
        engine.generate(prompt, GREEDY)


def test_the_end_token_stops_and_is_not_shown(engine: Engine, monkeypatch: Any) -> None:
    monkeypatch.setattr("offload.generation.sampling.Sampler.__call__", lambda *args: EOS_ID)
    _, done = finish(engine.generate(HELLO, GREEDY))
    assert (done.reason, done.text, done.new_tokens) == ("stop", "", 1)


def test_stop_strings_end_the_answer_and_are_not_shown(engine: Engine) -> None:
    sampled = SamplingSettings(temperature=1.5, seed=3, max_new_tokens=40)
    whole = finish(engine.generate(HELLO, sampled))[1].text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    _, done = finish(engine.generate(HELLO, sampled.overridden({"stop": [stop]})))
    assert done.reason == "stop"
    assert done.text == whole[: whole.index(stop)]


def test_statistics_are_true_sums(engine: Engine) -> None:
    _, done = finish(engine.generate(HELLO, GREEDY))
    stats = done.stats
    experts, read = stats.experts, stats.bytes
    assert experts.accesses == experts.hits + experts.pending + experts.misses
    record = engine.plan.sizes.slot_bytes
    assert read.disk_read == experts.misses * record
    assert stats.seconds.compute + stats.seconds.stall_disk == pytest.approx(stats.seconds.total)
    assert stats.memory.expert_slots == 16 and stats.memory.residency == 0.5
    assert (read.host_to_device, stats.seconds.stall_link, stats.memory.vram_peak_bytes) == (None, None, None)
    assert set(stats.to_json()) == {
        "model", "device", "format", "dense_format", "policy", "scope", "prefetch", "seed", "prompt_tokens",
        "new_tokens", "start_s", "ttft_s", "prefill_tokens_per_s", "decode_tokens_per_s", "experts", "bytes", "seconds",
        "memory", "prefilled_tokens", "prefill_passes", "decode_passes", "shared_prompt_tokens", "host_tier", "virtual",
        "prefetch_auto", "miss", "graphs", "host_policy",
    }  # fmt: skip
    json.dumps(stats.to_json(), allow_nan=False)


def test_what_was_not_measured_is_null(checkpoint: Path, packs: Path) -> None:
    with open_tiny(checkpoint, packs) as engine:
        before = engine.stats()
        _, one = finish(engine.generate(HELLO, SamplingSettings(temperature=0, max_new_tokens=1)))
    assert (before.ttft_s, before.decode_tokens_per_s, before.experts.hit_rate) == (None, None, None)
    assert one.stats.ttft_s is not None
    assert (one.stats.decode_tokens_per_s, one.stats.bytes.per_decode_token) == (None, None)
    assert one.stats.experts.decode_hit_rate is None


def test_the_session_adds_up_its_answers(engine: Engine) -> None:
    parts = [finish(engine.generate(HELLO, GREEDY))[1].stats for _ in range(3)]
    whole = engine.stats()
    assert whole.new_tokens == sum(part.new_tokens for part in parts)
    assert whole.experts.misses == sum(part.experts.misses for part in parts)
    assert whole.bytes.disk_read == sum(part.bytes.disk_read for part in parts)


def test_the_trace_has_every_token_of_every_layer_once(checkpoint: Path, packs: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    with open_tiny(checkpoint, packs, trace_out=path, prefill_chunk=6) as engine:
        dones = [finish(engine.generate(text, GREEDY))[1] for text in ("first prompt", "second")]
        counters = engine._runtime.cache.counters
        events = counters.prefill.accesses + counters.decode.accesses
    trace = load_trace(path)
    known = {"model": checkpoint.name, "layers": 4, "experts": 8, "top_k": 2, "format": "native"}
    assert trace.meta.items() >= known.items()
    assert trace.meta["expert_bytes"] > 0 and trace.meta["resident_bytes"] > 2**20
    for request, done in enumerate(dones):
        for layer in range(4):
            steps = trace.step[(trace.request == request) & (trace.layer == layer)]
            assert steps.tolist() == list(range(done.prompt_tokens + done.new_tokens - 1))
    groups = {(f, layer): set() for f, layer in zip(trace.forward.tolist(), trace.layer.tolist(), strict=True)}
    for forward, layer, ids in zip(trace.forward.tolist(), trace.layer.tolist(), trace.ids, strict=True):
        groups[forward, layer] |= set(ids.tolist())
    assert sum(len(group) for group in groups.values()) == events, "grouping by forward and layer gives the events"
    assert (trace.phase == DECODE).sum() == 4 * sum(done.new_tokens - 1 for done in dones)


def test_a_budget_that_is_too_small_names_one_that_works(checkpoint: Path, packs: Path) -> None:
    with pytest.raises(BudgetError, match="--ram") as caught:
        open_tiny(checkpoint, packs, ram=10 * 2**20)
    named = int(str(caught.value).split("--ram ")[-1].split("MiB")[0])
    with open_tiny(checkpoint, packs, ram=(named + 8) * 2**20) as engine:  # the process itself may grow a little
        assert engine.plan.slots >= 1


def test_the_plan_needs_no_weights(checkpoint: Path, tmp_path: Path) -> None:
    from offload.config import EngineSettings

    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    plan = plan_model(EngineSettings(model=str(tmp_path), context_tokens=64), lambda event: None).plan
    assert plan.sizes.num_experts == 32
    assert [name for name, _, _ in plan.rows()][-2:] == ["expert slots", "unused"]


def test_saving_a_skeleton_is_refused(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="skeleton"):
        engine._model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_expert_parameter_is_in_memory(engine: Engine) -> None:
    names = [name for name, _ in engine._model.named_parameters()]
    assert names and not any(".experts." in name for name in names)
    assert not any(p.is_meta for p in engine._model.parameters()) and not any(
        b.is_meta for b in engine._model.buffers()
    )


def test_an_unknown_policy_is_refused_before_anything_is_loaded(checkpoint: Path, packs: Path) -> None:
    with pytest.raises(UsageError, match="--policy: unknown policy 'mru'"):
        open_tiny(checkpoint, packs, policy="mru")


def test_verify_finds_a_flipped_bit(checkpoint: Path, tmp_path: Path) -> None:
    open_tiny(checkpoint, tmp_path).close()
    (file,) = tmp_path.glob("*/experts.bin")
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    with pytest.raises(ExpertFileError, match="layer 0, expert 0 is damaged"):
        open_tiny(checkpoint, tmp_path, verify=True)


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "no"'])
def test_a_damaged_generation_config_is_refused_by_name(
    text: str, checkpoint: Path, packs: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"generation_config\.json: cannot be used"):
        open_tiny(tmp_path / "model", packs)


def test_cancel_inside_a_pass_with_everything_resident(checkpoint: Path, packs: Path) -> None:
    with open_tiny(checkpoint, packs, residency=1.0) as engine:
        whole = finish(engine.generate(HELLO, GREEDY))[1].text
        engine._kv.reset()
        hook = engine._model.model.layers[1].register_forward_hook(lambda *args: engine.cancel())
        _, done = finish(engine.generate(HELLO, GREEDY))
        hook.remove()
        assert (done.reason, done.new_tokens) == ("cancelled", 0)
        assert finish(engine.generate(HELLO, GREEDY))[1].text == whole

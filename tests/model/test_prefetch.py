"""Prefetching on a prediction: the same tokens, loads counted, the cache consistent, errors left to the demand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cache.cache_log import load_log, replay_log
from cache.guesses import GuessWorth
from cache.keys import ExpertKey
from offload.checkpoint.expert_file import ExpertFile
from offload.config import SamplingSettings
from offload.engine import Engine
from offload.errors import ExpertFileError
from offload.events import RowDone, RunStats
from offload.model.prefetch.next_gate import NextGate
from tests.engines import finish, open_tiny
from tests.tiny_models import build_tiny

VARIED = SamplingSettings(temperature=1.5, max_new_tokens=40, seed=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("qwen3_moe", tmp_path_factory.mktemp("prefetch") / "model")


def answer(engine: Engine) -> tuple[str, RunStats]:
    _, done = finish(engine.generate("one two three", VARIED))
    assert done.error is None
    engine._runtime.cache.check_integrity()
    return done.text, done.stats


def test_the_same_tokens_with_and_without(checkpoint: Path, tmp_path: Path) -> None:
    texts = set()
    for prefetch in ("off", "next-gate"):
        for residency in (0.01, 0.5, 1.0):
            with open_tiny(checkpoint, tmp_path, prefetch=prefetch, residency=residency) as engine:
                texts.add(answer(engine)[0])
    assert len(texts) == 1


def test_prefetches_are_made_used_and_counted(checkpoint: Path, tmp_path: Path) -> None:
    with open_tiny(checkpoint, tmp_path, prefetch="next-gate", residency=0.5) as engine:
        _, stats = answer(engine)
    assert stats.prefetch == "next-gate"
    assert stats.experts.prefetched > 0
    assert 0 < stats.experts.prefetch_used <= stats.experts.prefetched
    with open_tiny(checkpoint, tmp_path, residency=0.5) as engine:
        assert answer(engine)[1].experts.prefetched == 0


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_a_token_prefetches_no_more_bytes_than_it_may(checkpoint: Path, tmp_path: Path, device: str) -> None:
    settings = {"device": device, "residency": 0.5, "prefetch": "next-gate"}
    with open_tiny(checkpoint, tmp_path, **settings) as engine:
        size = engine.plan.sizes.slot_bytes
        whatever_its_worth(engine)
        free = answer(engine)[1]
        assert free.bytes.prefetched == free.experts.prefetched * size
        most = 8 if device == "simulated" else 4
        assert free.experts.prefetched <= most * free.decode_passes, "auto: top 2, or half of it, in 4 layers"
    with open_tiny(checkpoint, tmp_path, prefetch_bytes=2 * size - 1, **settings) as engine:
        each: list[int] = []
        real = engine._runtime.end_token

        def end_token(seconds: float) -> None:
            each.append(engine._runtime.transfers.prefetch_bytes - sum(each))
            real(seconds)

        engine._runtime.end_token = end_token  # type: ignore[method-assign]
        whatever_its_worth(engine)
        stats = answer(engine)[1]
        assert max(each) == size, "two do not fit"
        assert 0 < stats.bytes.prefetched < free.bytes.prefetched
    with open_tiny(checkpoint, tmp_path, prefetch_bytes=size - 1, **settings) as engine:
        assert answer(engine)[1].experts.prefetched == 0


def whatever_its_worth(engine: Engine) -> None:
    """A random model's routers foretell little, which is not worth a copy."""
    engine._runtime.predictor.worth = GuessWorth(least=0)  # type: ignore[union-attr]


def test_guesses_that_do_not_come_true_are_not_loaded(checkpoint: Path, tmp_path: Path) -> None:
    with open_tiny(checkpoint, tmp_path, prefetch="next-gate", residency=0.5, device="simulated") as engine:
        chosen = answer(engine)[1].experts
    with open_tiny(checkpoint, tmp_path, prefetch="next-gate", residency=0.5, device="simulated") as engine:
        whatever_its_worth(engine)
        all_of_them = answer(engine)[1].experts
    assert 0 < chosen.prefetched < all_of_them.prefetched / 2


def test_a_failed_prefetch_is_no_error_until_it_is_needed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_tiny(checkpoint, tmp_path, prefetch="next-gate", residency=0.5) as engine:
        expected = answer(engine)[0]
        runtime = engine._runtime
        layer = max(runtime._file._layers)
        wanted = ExpertKey(layer, 0)
        for resident in list(runtime.cache.resident()):
            if resident == wanted:
                runtime.cache._vacate(wanted)
        real = ExpertFile.read_into

        def failing(self: ExpertFile, key: ExpertKey, buffer: memoryview) -> int:
            raise ExpertFileError(f"expert {key.expert} cannot be read")

        monkeypatch.setattr(ExpertFile, "read_into", failing)
        runtime._prefetch([(layer, [0])])
        while not all(ticket.ready() for ticket in runtime._ahead.values()):
            pass
        runtime._take_arrivals()
        assert wanted not in runtime.cache.resident()
        monkeypatch.setattr(ExpertFile, "read_into", real)
        assert answer(engine)[0] == expected


def test_prediction_is_the_next_router_on_this_layers_input(checkpoint: Path, tmp_path: Path) -> None:
    with open_tiny(checkpoint, tmp_path) as engine:
        model: Any = engine._model
        blocks = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]
        modules = [module.__dict__["run_local"][1] for module in (block.experts for block in blocks)]
        predictor = engine_predictor(engine)
        hidden = torch.randn(1, model.config.hidden_size, dtype=model.dtype)
        for number in range(2):
            assert list(predictor.guesses(modules[number], hidden, 1)) == [
                (modules[after], blocks[after].gate(hidden)[2][0, :1].tolist()) for after in (number + 1, number + 2)
            ], "the first choice of the next two layers"
        assert len(modules) == 4
        last = (modules[3], blocks[3].gate(hidden)[2][0, :1].tolist())
        assert list(predictor.guesses(modules[2], hidden, 1)) == [last], "nothing is known of the next token"
        assert list(predictor.guesses(modules[3], hidden, 1)) == []
        for layer, experts in zip(modules, ([7, 1], [3, 4], [5, 6], [0, 2]), strict=True):
            predictor.record_event(layer, experts, decode=True)
        assert list(predictor.guesses(modules[2], hidden, 1)) == [last, (modules[0], [7])]
        assert list(predictor.guesses(modules[3], hidden, 2)) == [(modules[0], [7, 1]), (modules[1], [3, 4])]
        rows = torch.randn(3, model.config.hidden_size, dtype=model.dtype)
        rows = torch.cat([rows, rows[1:2]])  # so that what the second one wants is wanted twice
        guessed = list(predictor.guesses(modules[1], rows, 2))
        best = [[int(expert) for expert in torch.nn.functional.linear(row, blocks[2].gate.weight).topk(2).indices]
                for row in rows]  # fmt: skip
        (layer, experts), *further = guessed
        assert (layer, further) == (modules[2], []), "of several rows the next layer alone"
        wanted = {expert: sum(expert in row for row in best) for row in best for expert in row}
        assert sorted(experts) == sorted(wanted), "the first choices of each row"
        assert [wanted[expert] for expert in experts] == sorted(wanted.values(), reverse=True)
        assert list(predictor.guesses(modules[3], rows, 2)) == []


@pytest.mark.parametrize("prefetch", ["next-gate", "previous-token"])
def test_rows_of_a_batch_prefetch(checkpoint: Path, tmp_path: Path, prefetch: str) -> None:
    def run(**settings: Any) -> tuple[list[tuple[str, str | None]], RunStats]:
        with open_tiny(checkpoint, tmp_path, residency=0.4, batch_rows=3, **settings) as engine:
            texts = ("one two three", "four", "five six", "seven eight nine ten", "one")
            rows = iter([engine.prepare(text, SamplingSettings(temperature=0, max_new_tokens=24)) for text in texts])
            events = engine.generate_rows(lambda room: next(rows, None))
            ends = [event for event in events if isinstance(event, RowDone)]
            engine._runtime.cache.check_integrity()
            return sorted((end.text, end.error) for end in ends), engine.stats()

    expected, plain = run()
    assert plain.experts.prefetched == 0
    log = tmp_path / "cache.log"
    found, stats = run(prefetch=prefetch, cache_log=log)
    assert found == expected
    assert 0 < stats.experts.prefetch_used <= stats.experts.prefetched
    counters = replay_log(load_log(log))
    assert counters.decode.hits + counters.prefill.hits == stats.experts.hits
    size = stats.bytes.prefetched // stats.experts.prefetched
    assert run(prefetch=prefetch, prefetch_bytes=size // 3 - 1)[1].experts.prefetched == 0, "three rows have no byte"


def engine_predictor(engine: Engine) -> NextGate:
    from offload.model.transformers_api import ExpertsModule

    found = []
    for path, module in engine._model.named_modules():
        if "run_local" in module.__dict__:
            layer = module.__dict__["run_local"][1]
            found.append(ExpertsModule(path, layer, int(module.num_experts), {}, module))  # type: ignore[arg-type]
    return NextGate(engine._model, found)

"""Families x formats x devices: prefill, decode and a batch of rows give what the stock model gives.

``make test`` runs a set that covers every pair of a family, a format and a device, as far as there are checkpoints of
that family in that format; ``make test-all`` runs all of them. Native weights are compared bit for bit, and published
ones where they are decoded for the library's products: on devices, and in bfloat16. The others are compared with the
stock model that has the decoded weights, up to rounding. The set follows from the lists alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from offload.checkpoint.formats import get_format
from offload.checkpoint.source import open_source
from offload.compute.matrix import QuantizedMatrix, decode
from offload.config import SamplingSettings
from offload.engine import Engine
from offload.events import RowDone
from tests.engines import finish, open_tiny
from tests.model.test_bit_exact import DECODE_IDS, IDS, assert_equal, logits
from tests.published_families import PUBLISHED
from tests.tiny_models import TINY_ARCHITECTURES, build_tiny, load_reference

DEVICES = ("cpu", "simulated")
OWN_FORMATS = ("native", "int8", "int4")
PROMPTS = ("the expert that", "a hit", "what is the capital of France? Paris")
GREEDY = SamplingSettings(temperature=0, max_new_tokens=4, ignore_eos=True)


class Case(NamedTuple):
    family: str
    format: str
    device: str


ALL_CASES = [Case(*case) for case in product(TINY_ARCHITECTURES, OWN_FORMATS, DEVICES)] + [
    Case(family, name, device) for name, families in PUBLISHED.items() for family in families for device in DEVICES
]
ELSEWHERE = {("family", family, "format", "native") for family in TINY_ARCHITECTURES}
"""Pairs that ``test_bit_exact`` covers."""


def pairs(case: Case) -> set[tuple[str, str, str, str]]:
    named = zip(Case._fields, case, strict=True)
    return {(*one, *other) for one, other in combinations(named, 2)}


def covering(cases: Collection[Case], covered: Iterable[tuple[str, str, str, str]] = ()) -> list[Case]:
    """A small subset of ``cases`` with all of their pairs but ``covered``; the same one whenever it is asked for."""
    left = set().union(*map(pairs, cases)) - set(covered)
    chosen = []
    while left:
        best = max(cases, key=lambda case: len(pairs(case) & left))  # of equals the first
        chosen.append(best)
        left -= pairs(best)
    return chosen


QUICK = covering(ALL_CASES, ELSEWHERE)


def test_every_pair_is_covered() -> None:
    covered = set().union(*map(pairs, QUICK)) | ELSEWHERE
    assert covered == set().union(*map(pairs, ALL_CASES))
    assert covering(ALL_CASES, ELSEWHERE) == QUICK
    assert len(QUICK) < len(ALL_CASES) / 2


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in ALL_CASES],
    ids=lambda case: "-".join(case).replace(" ", "_"),
)
def test_prefill_decode_and_rows(case: Case, tmp_path: Path) -> None:
    if case.format in PUBLISHED:
        pair = PUBLISHED[case.format][case.family](tmp_path)
        checkpoint, stock, chosen = pair.published, load_reference(pair.reference), "native"
    else:
        checkpoint, chosen = build_tiny(case.family, tmp_path / "checkpoint"), case.format
        stock = load_reference(checkpoint)
        if chosen != "native":
            put_decoded_weights(stock, checkpoint, chosen)
    rows = 3 if case.device == "cpu" else 1
    # float32, so that another order of the sums cannot choose another expert
    kernels = case.format in PUBLISHED and case.device == "cpu" and stock.dtype == torch.float32
    settings = {"residency": 0.4, "batch_rows": rows, "kernels": "auto" if kernels or chosen != "native" else "torch"}
    with open_tiny(checkpoint, tmp_path / "packs", device=case.device, format=chosen, **settings) as engine:
        found, expected = [step.cpu() for step in logits(engine)], stock_logits(stock)
        if chosen == "native" and not kernels:
            assert_equal(found, expected)
        else:
            for mine, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))
        assert answers(engine) == [stock_answer(engine, stock, prompt) for prompt in PROMPTS]
        engine._runtime.cache.check_integrity()


def put_decoded_weights(model: PreTrainedModel, checkpoint: Path, format_name: str) -> None:
    """Replace the experts' weights by what is left of them in ``format_name``."""
    source, form = open_source(checkpoint), get_format(format_name)
    for module in source.experts:
        layout = form.layout(module.tensors, module.transposed)
        for expert in range(module.num_experts):
            record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
            form.encode(layout, source.read_expert(module, expert), record, module.transposed)
            for name, view in form.views(layout, record).items():
                if isinstance(view, QuantizedMatrix):
                    weight = decode(view, torch.float32, None)
                    parts = stock_weights(model, module.path, name, expert)
                    weight = weight.t() if name in module.transposed else weight
                    for part, own in zip(parts, weight.chunk(len(parts)), strict=True):
                        part.copy_(own)


def stock_weights(model: PreTrainedModel, path: str, name: str, expert: int) -> list[torch.Tensor]:
    """An expert's parts of the stock model's own parameters, one below the other; views, to be written through."""
    parent, _, last = path.rpartition(".")
    block = model.get_submodule(parent)
    if not hasattr(block, last):  # JetMoE: the block itself holds them
        stack = block.input_linear if name == "gate_up_proj" else block.output_linear
        return [stack.weight.data[expert]]
    experts = model.get_submodule(path)
    if not hasattr(experts, "mlp"):
        parameter = experts._parameters[name]
        assert parameter is not None
        return [parameter.data[expert]]
    stock = experts.mlp  # DBRX: the experts one below the other
    inner = stock.ffn_hidden_size
    rows = slice(expert * inner, (expert + 1) * inner)
    return [stock.w2.data[rows]] if name == "down_proj" else [stock.w1.data[rows], stock.v1.data[rows]]


def stock_logits(model: PreTrainedModel) -> list[torch.Tensor]:
    """As :func:`tests.tiny_models.reference_logits`."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    with torch.inference_mode():
        return [
            model(input_ids=step, past_key_values=cache, use_cache=True).logits
            for step in (IDS, *(torch.tensor([[token]]) for token in DECODE_IDS))
        ]


def stock_answer(engine: Engine, model: PreTrainedModel, prompt: str) -> str:
    """The greedy answer of the stock model."""
    ids, new = engine.encode(prompt), []
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    step = torch.tensor([ids])
    with torch.inference_mode():
        while len(new) < GREEDY.max_new_tokens:
            best = int(model(input_ids=step, past_key_values=cache, use_cache=True).logits[0, -1].argmax())
            new.append(best)
            step = torch.tensor([[best]])
    tokenizer = engine._encoder.tokenizer
    shown = tokenizer.decode([*ids, *new], skip_special_tokens=True)
    return str(shown[len(tokenizer.decode(ids, skip_special_tokens=True)) :])


def answers(engine: Engine) -> list[str]:
    """Those of the engine: in shared passes where the family's rows can share them, else one after the other."""
    if engine.rows_at_once == 1:
        texts = []
        for prompt in PROMPTS:
            engine.reset()
            texts.append(finish(engine.generate(prompt, GREEDY))[1].text)
        return texts
    waiting = [engine.prepare(prompt, GREEDY) for prompt in PROMPTS]
    ends = [event for event in engine.generate_rows(lambda room: waiting.pop(0) if waiting else None)]
    of_row = {event.row: event.text for event in ends if isinstance(event, RowDone)}
    return [of_row[row] for row in range(len(PROMPTS))]

"""What the table of families says, made of what the tests build and see.

``python -m tests.families`` writes it anew, with the page in the manual.
"""

from __future__ import annotations

import itertools
import json
import re
import tempfile
from pathlib import Path

import torch
import transformers
from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cache.guesses import guesses_of
from offload.catalogue import Catalogue, Family, write_catalogue
from offload.checkpoint.source import open_source
from offload.engine import Engine
from offload.model.families import needs_whole_prompts, rows_may_share
from offload.model.families.known import DO_NOT_RUN
from offload.model.families.names import known_model_type
from offload.model.prefetch.next_gate import NextGate
from tests.engines import open_tiny
from tests.published_families import formats_of
from tests.tiny_models import FURTHER_ARCHITECTURES, MULTIMODAL, TINY_ARCHITECTURES, build_tiny

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "tests" / "data" / "configs"
PAGE = ROOT / "docs" / "models.md"
_PLACE = re.compile(r"(?<=<!-- the table -->\n).*?(?=\n<!-- the end of the table -->)", re.S)
_TOKENS = (7, 9, 11, 200, 31, 64, 5, 150, 77, 18)


def transformers_version() -> str:
    """Without the last part, as in the bounds of the dependency."""
    return ".".join(transformers.__version__.split(".")[:2])


def described(name: str, checkpoint: Path, engine: Engine) -> Family:
    """The family ``name``, of which ``engine`` runs the tiny ``checkpoint``. Decodes some tokens."""
    model_type = engine._model.config.model_type
    return Family(
        name=name,
        model_class=type(engine._model).__name__,
        models=published_models(name),
        layout=layout_of(checkpoint),
        formats=formats_of(name),
        next_gate=foretells(engine),
        shares_rows=engine.rows_at_once > 1 or rows_may_share(model_type),
        whole_prompts=needs_whole_prompts(model_type),
    )


def published_models(name: str) -> tuple[str, ...]:
    """Those whose configs are planned, with their weights."""
    found = []
    for key, published in json.loads((CONFIGS / "published.json").read_text(encoding="utf-8")).items():
        config = json.loads((CONFIGS / key / "config.json").read_text(encoding="utf-8"))
        types = {known_model_type(config) or config["model_type"], config.get("text_config", {}).get("model_type")}
        if name in types:
            billions = published["parameters"] / 1e9
            found.append(f"{published['model']} ({billions:{'.0f' if billions > 100 else '.3g'}} B)")
    return tuple(found)


def layout_of(checkpoint: Path) -> str:
    """Names of the tensors of an expert, without what stands before them."""
    source = open_source(checkpoint)
    module = source.experts[0]
    names, fused = [], False
    for parameter in sorted(module.tensors, key=lambda name: ("down" in name, name)):
        found = source.expert_sources[module.path, parameter]
        for pattern, keys in found.keys.items():
            separate = found.converter is not None and "*" in pattern
            fused = fused or not separate
            names.append(re.sub(r".*\.experts\.(\d+\.)?|.*\.(?=\w+\.weight$)", "", keys[0]).removesuffix(".weight"))
    kind = "stacked" if fused else "each by itself"
    turned = ", inputs first" if module.transposed else ""
    return f"{kind}: {', '.join(names)}{turned}"


def foretells(engine: Engine) -> str:
    """How often a layer chooses all the experts that ``next-gate`` names for what it gets, the likelier half."""
    gate = NextGate(engine._model, engine._modules)
    runtime = engine._runtime
    run, events = runtime.run, []

    def watched(
        module: object, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        events.append((layer, hidden, ids))
        return run(module, layer, hidden, ids, weights)

    engine.reset()  # the answer must not depend on what the engine did before
    runtime.run = watched  # type: ignore[method-assign]
    right = []
    try:
        for token in _TOKENS:
            events.clear()
            engine._passes.run([token], decode=True)
            for (now, _, _), (after, hidden, ids) in itertools.pairwise(events):
                found = next(gate.guesses(now, hidden, guesses_of(ids.shape[1], link=False)), None)
                right.append(found is not None and found[0] == after and {*found[1]} <= {*ids[0].tolist()})
    finally:
        del runtime.run
    share = sum(right) / len(right) if right else 0
    return "yes" if share >= 0.85 else "mostly" if share >= 0.6 else "no"


def families_behind_the_interface() -> set[str]:
    """Of the library's text models: those whose experts are behind its interface, by their source."""
    found = set()
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        module = model_type_to_module_name(name)
        folder = Path(transformers.__file__).parent / "models" / module
        if name in CONFIG_MAPPING_NAMES and any(
            "@use_experts_implementation" in file.read_text(encoding="utf-8") for file in folder.glob("modeling_*.py")
        ):
            found.add(name)
    return found


def page_with(catalogue: Catalogue) -> str:
    """The page in the manual with this table."""
    return _PLACE.sub(lambda place: catalogue.markdown(), PAGE.read_text(encoding="utf-8"))


def untested() -> tuple[str, ...]:
    elsewhere = {*TINY_ARCHITECTURES, *FURTHER_ARCHITECTURES, *MULTIMODAL, *DO_NOT_RUN}
    return tuple(sorted(families_behind_the_interface() - elsewhere))


def main() -> None:
    families = []
    for name in sorted(TINY_ARCHITECTURES):
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = build_tiny(name, Path(scratch) / "checkpoint")
            with open_tiny(checkpoint, Path(scratch) / "packs", residency=1.0) as engine:
                families.append(described(name, checkpoint, engine))
        print(families[-1])
    catalogue = Catalogue(transformers_version(), tuple(families), untested())
    write_catalogue(catalogue)
    PAGE.write_text(page_with(catalogue), encoding="utf-8")


if __name__ == "__main__":
    main()

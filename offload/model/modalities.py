"""Text in, text out: what else a multimodal model takes or gives is left out of it."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from transformers import PretrainedConfig, PreTrainedModel

from offload.errors import ModelError
from offload.model.transformers_api import forget_part

_TEXT = ("text", "thinker", "decoder", "llm")


class LeftOut(torch.nn.Module):
    """Stands where a part was that a text never passes through."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ModelError(f"the model called its part '{self.name}', which is left out: only text is taken")


def other_modalities(config: PretrainedConfig) -> tuple[str, ...]:
    """What a checkpoint has beside its text model by its config: ``vision``, ``audio``; empty for a text model."""
    if config.get_text_config() is config:
        return ()
    names = (name.removesuffix("_config") for name in config.sub_configs if getattr(config, name, None) is not None)
    return tuple(name for name in names if name not in _TEXT)


def leave_out_modalities(model: PreTrainedModel) -> None:
    """Replace all that stands beside the way of a text through a meta model. Changes ``model``; no text model.

    That way is the decoder, what contains it, and the embeddings at both ends.
    """
    decoder = model.get_decoder()
    ends = {id(module) for module in (decoder, model.get_input_embeddings(), model.get_output_embeddings())}
    (path,) = (path for path, module in model.named_modules() if module is decoder)
    names = path.split(".")
    for depth in range(len(names)):
        holder = ".".join(names[:depth])
        for name, child in list(model.get_submodule(holder).named_children()):
            on_the_way = not ends.isdisjoint(id(module) for module in child.modules())
            if not on_the_way and next(child.parameters(), None) is not None:
                part = ".".join([*names[:depth], name])
                forget_part(model, part)
                setattr(model.get_submodule(holder), name, LeftOut(name))

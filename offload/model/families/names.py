"""Published configs that call a family by another name than transformers does, or by none, and families of our own."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

_OTHER_NAMES = {"kimi_k2": "deepseek_v3"}
"""Kimi K2 and K2 Thinking are DeepSeek-V3's architecture: their model card names this change of ``model_type``."""
_BY_CLASS = {"Grok1ModelForCausalLM": "grok-1"}
"""Of configs without a ``model_type``: by their first of ``architectures``."""
_OWN = {"grok-1": "offload.model.families.grok1"}
"""Modules of families that transformers has no class for; each has a function ``register``."""


def known_model_type(config: Mapping[str, Any]) -> str | None:
    """The ``model_type`` to read a ``config.json`` as; None: the one that it names.

    A family of our own is known to transformers from then on.
    """
    said = config.get("model_type") or _BY_CLASS.get(str((config.get("architectures") or [None])[0]))
    name = _OTHER_NAMES.get(str(said), str(said))
    if name in _OWN:
        import_module(_OWN[name]).register()
        return name
    return name if name != str(config.get("model_type")) else None

"""What runs and what does not, by ``model_type``. Kept true by tests, which compare it with the library installed."""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

RUNS = frozenset(
    """
    afmoe aria aria_text axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v32
    deepseek_v4 dots1 dots3_note_text ernie4_5_moe exaone_moe flex_olmo flint gemma4 gemma4_text glm4_moe
    glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoehybrid
    granitemoeshared grok-1 hunyuan_v1_moe hy_v3 hy_v4 inkling2 inkling2_text inkling_text internvl jamba jetmoe
    kimi_k25 kimi_linear kolibri1 laguna lfm2_moe llama4 llama4_text longcat_flash mellum mimo_v2_flash
    minimax_m2 minimax_m3_vl minimax_m3_vl_text mistral3 mistral_large4 mixtral muse_spark nemotron_h olmoe
    phimoe qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen3_omni_moe_thinker qwen3_vl_moe
    qwen4_exp solar_open step3p7 unlimited_ocr zaya
    """.split()
)
"""Each was run with a tiny random model, whose logits are those of the stock model bit for bit."""


class DoesNotRun(NamedTuple):
    reason: str
    nearest: str


DO_NOT_RUN = {
    "diffusion_gemma": DoesNotRun("they write whole blocks at once, by diffusion", "gemma4"),
    "doge": DoesNotRun("their experts are single rows of an embedding", "olmoe"),
    "ernie4_5_vl_moe": DoesNotRun(
        "a layer has experts for text and others for images, in one list of tensors", "ernie4_5_moe"
    ),
    "minimax": DoesNotRun("they keep a cache of a kind of their own", "minimax_m2"),
    "nllb-moe": DoesNotRun("they translate, with an encoder", "mixtral"),
    "openai_privacy_filter": DoesNotRun("they mark words and write none", "gpt_oss"),
    "qwen3_omni_moe": DoesNotRun("they are several models, of which one writes text", "qwen3_omni_moe_thinker"),
    "switch_transformers": DoesNotRun("they have an encoder", "mixtral"),
}
"""Families with experts that transformers has and that cannot be run."""


def what_runs_instead(model_type: str) -> str:
    """The nearest thing that works, for the end of an error's line: of the same family by its first letters, if any."""
    if model_type in DO_NOT_RUN:
        return f"the nearest that can be run: {DO_NOT_RUN[model_type].nearest}"
    family = re.match("[a-z]{3,}", model_type)
    kin = [name for name in sorted(RUNS) if family and name.startswith(family[0])]
    if close := difflib.get_close_matches(model_type, kin or sorted(RUNS), n=2, cutoff=0.3 if kin else 0.6):
        return f"the nearest that can be run: {' and '.join(close)}"
    return f"{len(RUNS)} kinds of models can be run, such as mixtral, qwen3_moe, deepseek_v3 and gpt_oss"

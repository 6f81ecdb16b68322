"""How the families chat: their special tokens, small chat templates that do what the published ones do, and an answer.

The templates are written from the published ones (llama.cpp's ``models/templates`` has most of them; gpt-oss: the
openai-cookbook repository's ``articles/openai-harmony.md``), without tools, images and dates.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import save_tiny_tokenizer

_IF_LAST = (
    "{% set last = namespace(user=-1) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class ChatModel:
    """``special`` tokens are not shown, ``plain`` ones are tokens of their own and shown. ``answer`` is what the model
    writes, and ``ends`` the token behind it, by the template or by ``eos``.
    """

    special: tuple[str, ...]
    plain: tuple[str, ...]
    template: str
    answer: str
    reasoning: str
    reply: str
    ends: str
    eos: str
    past: str
    """How the template shows an earlier answer, "past" with the reasoning "secret", to the model."""


CHAT_MODELS = {
    "gpt-oss": ChatModel(
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"),
        (),
        "<|start|>system<|message|>Valid channels: analysis, commentary, final.<|end|>"
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
        "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
        "{% else %}<|start|>{{ 'developer' if m.role == 'system' else m.role }}"
        "<|message|>{{ m.content }}<|end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        "<|channel|>analysis<|message|>Two and two.<|end|><|start|>assistant<|channel|>analysis<|message|>Four.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is **4**.",
        "Two and two.\n\nFour.",
        "It is **4**.",
        "<|return|>",
        "<|return|>",
        "<|start|>assistant<|channel|>final<|message|>past<|end|>",
    ),
    "Qwen3": ChatModel(
        ("<|im_start|>", "<|im_end|>"),
        ("<think>", "</think>", "<tool_call>", "</tool_call>"),
        _IF_LAST + "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.index0 > last.user and m.reasoning_content %}<think>\n"
        "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<think>\nTwo and two,\n\nso four.\n</think>\n\nIt is 4.",
        "Two and two,\n\nso four.",
        "It is 4.",
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>assistant\npast<|im_end|>\n",
    ),
    "Qwen3 Thinking": ChatModel(
        ("<|im_start|>", "<|im_end|>"),
        ("<think>", "</think>"),
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        "Two and two.\n</think>\n\nIt is 4.\n",
        "Two and two.",
        "It is 4.\n",
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>assistant\npast<|im_end|>\n",
    ),
    "DeepSeek-R1": ChatModel(
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        "<｜begin▁of▁sentence｜>{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}",
        "Two and two.\n</think>\n\n4",
        "Two and two.",
        "4",
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜Assistant｜>past<｜end▁of▁sentence｜>",
    ),
    "DeepSeek-V3.1": ChatModel(
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        "<｜begin▁of▁sentence｜>{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% else %}<｜Assistant｜></think>{{ m.content }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜></think>{% endif %}",
        "It is 4.",
        "",
        "It is 4.",
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜Assistant｜></think>past<｜end▁of▁sentence｜>",
    ),
    "GLM-4.6": ChatModel(
        ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        ("<think>", "</think>"),
        "[gMASK]<sop>" + _IF_LAST + "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n"
        "{% if loop.index0 > last.user and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
        "{% else %}<think></think>{% endif %}{{ '\\n' + m.content }}"
        "{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "\n<think>Two and two.</think>\nIt is 4.",
        "Two and two.",
        "It is 4.",
        "<|user|>",
        "<|endoftext|>",
        "<|assistant|>\n<think></think>\npast",
    ),
    "Kimi K2 Thinking": ChatModel(
        ("[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"),
        ("<think>", "</think>", "<|tool_call_begin|>", "<|tool_call_end|>"),
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_assistant|>assistant<|im_middle|><think></think>"
        "{% else %}<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}",
        "<think> Two and two. </think> It is 4.",
        "Two and two.",
        "It is 4.",
        "<|im_end|>",
        "[EOS]",
        "<|im_assistant|>assistant<|im_middle|><think></think>past<|im_end|>",
    ),
    "MiniMax-M2": ChatModel(
        ("]~!b[", "]~b]", "[e~["),
        ("<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>"),
        _IF_LAST + "]~!b[{% for m in messages %}]~b]{{ 'ai' if m.role == 'assistant' else m.role }}\n"
        "{% if m.role == 'assistant' and loop.index0 > last.user and m.reasoning_content %}<think>\n"
        "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}[e~[\n{% endfor %}"
        "{% if add_generation_prompt %}]~b]ai\n<think>\n{% endif %}",
        "Two and two.\n</think>\n\nLet me see.\n<think>\nFour.\n</think>\n\nIt is 4.",
        "Two and two.\n\nFour.",
        "Let me see.\n\n\nIt is 4.",
        "[e~[",
        "[e~[",
        "]~b]ai\npast[e~[\n",
    ),
    "Magistral": ChatModel(
        ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]")
        + ("[TOOL_CALLS]", "[ARGS]"),
        (),
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.role == 'system' %}"
        "[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}",
        "[THINK]Two and two.[/THINK]It is 4.",
        "Two and two.",
        "It is 4.",
        "</s>",
        "</s>",
        "past</s>",
    ),
    "Gemma 4": ChatModel(
        ("<bos>", "<eos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>"),
        (),
        "<bos>{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content }}<turn|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}",
        "<|channel>thought\nTwo and two.\n<channel|>It is 4.",
        "Two and two.",
        "It is 4.",
        "<turn|>",
        "<eos>",
        "<|turn>model\npast<turn|>\n",
    ),
}


def save_chat_tokenizer(model: ChatModel, folder: Path) -> None:
    """The tiny byte-level tokenizer with the tokens and the template of ``model``."""
    save_tiny_tokenizer(folder)
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=True) for text in model.special])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in model.plain])
    tokenizer.eos_token = model.eos
    tokenizer.chat_template = model.template
    tokenizer.save_pretrained(folder)

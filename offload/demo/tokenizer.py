"""The demo model's tokenizer, from the vocabulary in its GGUF file to a `tokenizer.json`.

Built with the `tokenizers` library rather than with transformers' GGUF import, which forgets that this family splits
numbers into single digits before the byte-level pattern (llama.cpp calls that pre-tokenizer "smollm"); runs of spaces
before a number would be cut differently.
"""

from __future__ import annotations

from typing import Any

from offload.demo.errors import DemoBuildError
from offload.demo.gguf_dense import gguf_field

_CONTROL = 3  # GGUF token type of special tokens


def read_tokenizer(reader: Any) -> Any:
    """Return the tokenizer of an opened GGUF file as a transformers fast tokenizer, chat template included.

    The end-of-sequence token is the end of a chat turn. Raises `DemoBuildError` if the file's tokenizer is of another
    kind.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def field(key: str) -> Any:
        return gguf_field(reader, "tokenizer." + key)

    if field("ggml.model") != "gpt2" or field("ggml.pre") != "smollm":
        raise DemoBuildError(f"the GGUF file has a tokenizer of another kind ({field('ggml.pre')}), smollm is needed")
    tokens: list[str] = field("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, field("ggml.token_type"), strict=True) if kind == _CONTROL]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[field("ggml.bos_token_id")],
        eos_token=tokens[field("ggml.eos_token_id")],
        unk_token=tokens[field("ggml.unknown_token_id")],
        pad_token=tokens[field("ggml.padding_token_id")],
        model_max_length=int(gguf_field(reader, "llama.context_length")),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = field("chat_template")
    return tokenizer

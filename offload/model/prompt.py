"""Tokenizer and chat template: from a prompt or a conversation to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offload.checkpoint.gguf_file import gguf_files
from offload.checkpoint.model_folder import side_folder
from offload.errors import ContextError, ModelError, UsageError
from offload.protocol import Message

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def _gguf_file(path: Path) -> dict[str, str]:
    """A GGUF model has its tokenizer in its file, unless the original one is beside it."""
    if any((side_folder(path) / name).exists() for name in _TOKENIZER_FILES) or not (files := gguf_files(path)):
        return {}
    return {"gguf_file": files[0].name}


class PromptEncoder:
    def __init__(self, folder: Path) -> None:
        """Load the checkpoint's own tokenizer. Raises ModelError if there is none that can be used."""
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                side_folder(folder), trust_remote_code=False, local_files_only=True, **_gguf_file(folder)
            )
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ModelError(
                f"{folder}: the tokenizer cannot be loaded ({reason[:300]}); fetch the tokenizer's files again"
            ) from error

    @property
    def eos_id(self) -> int | None:
        eos: int | None = self.tokenizer.eos_token_id
        return eos

    @property
    def begin_id(self) -> int | None:
        """The token that :meth:`encode` puts before every raw prompt, if it does so."""
        begin: int | None = self.tokenizer.bos_token_id
        return begin if self.tokenizer("a")["input_ids"][:1] == [begin] else None

    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text: special tokens and what was added to the vocabulary."""
        return frozenset((*self.tokenizer.all_special_ids, *getattr(self.tokenizer, "added_tokens_decoder", ())))

    def encode(self, prompt: str | Sequence[Message]) -> list[int]:
        """Token ids of a raw prompt (with the tokenizer's own special tokens) or of a conversation.

        Raises UsageError if there is nothing to encode or the template does not take the conversation.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise UsageError("the prompt is empty")
            ids: list[int] = self.tokenizer(prompt)["input_ids"]
        else:
            ids = self._encode_messages(prompt)
        if not ids:
            raise UsageError("the prompt is empty")
        return ids

    def _encode_messages(self, messages: Sequence[Message]) -> list[int]:
        if not any(message["content"].strip() for message in messages if message["role"] == "user"):
            raise UsageError("the prompt is empty")
        if not self.tokenizer.chat_template:
            raise UsageError(
                "this model has no chat template: it continues text and does not chat; "
                'use batch with "prompt" rows, or an instruction-tuned variant of the model'
            )
        try:
            text: str = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates raise jinja errors of their own making
            raise UsageError(f"the chat template does not take this conversation: {error}") from error
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def checked_ids(ids: Sequence[int], vocabulary: int) -> list[int]:
    """``ids`` as a list. Raises UsageError if there are none or one is not in the vocabulary."""
    if not ids:
        raise UsageError("the prompt is empty")
    if not 0 <= min(ids) <= max(ids) < vocabulary:
        raise UsageError(f"the prompt has token ids outside of the vocabulary (0 to {vocabulary - 1})")
    return list(ids)


def fitting_ids(ids: Sequence[int], vocabulary: int, context: int) -> list[int]:
    """``ids`` as a list. Raises UsageError as :func:`checked_ids` does, ContextError if they do not fit."""
    ids = checked_ids(ids, vocabulary)
    if len(ids) >= context:
        raise ContextError(
            f"the prompt has {len(ids)} tokens, but the context holds {context} with at least one new "
            "token; shorten it or give a larger --ctx",
            len(ids),
            context,
        )
    return ids

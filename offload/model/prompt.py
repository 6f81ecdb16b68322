"""Tokenizer and chat template: from a prompt or a conversation to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offload.errors import ContextError, UsageError
from offload.model.tokenizers import load_tokenizer, missing_template
from offload.protocol import Message

_ANSWER = "an answer"


class PromptEncoder:
    def __init__(self, folder: Path) -> None:
        """Load the checkpoint's own tokenizer. Raises ModelError if there is none that can be used."""
        self.tokenizer: Any = load_tokenizer(folder)
        self._folder = folder

    def end_ids(self) -> frozenset[int]:
        """What ends an answer by the tokenizer, and by the chat template: the token that it puts behind one."""
        found = {self.tokenizer.eos_token_id} - {None}
        asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]
        try:
            behind = self._render(asked, ask=False).rpartition(_ANSWER)[2]
        except Exception:  # no template, or one that takes no such conversation
            return frozenset(found)
        added = added_tokens(self.tokenizer)
        ends = [text for text in added if behind.lstrip().startswith(text)]
        if "<|channel|>" in added:  # gpt-oss: between the messages of one answer
            ends = [text for text in ends if text != "<|end|>"]
        return frozenset(found | {added[text] for text in sorted(ends, key=len)[-1:]})

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
                missing_template(self._folder)
                or "this model has no chat template: it continues text and does not chat; "
                'use batch with "prompt" rows, or an instruction-tuned variant of the model'
            )
        try:
            text = self._render(messages, ask=True)
        except Exception as error:  # templates raise jinja errors of their own making
            raise UsageError(f"the chat template does not take this conversation: {error}") from error
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _render(self, messages: Sequence[Message], ask: bool) -> str:
        """The conversation as text; ``ask``: with the beginning of an answer."""
        text: str = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=ask, tokenize=False)
        return text


def added_tokens(tokenizer: Any) -> dict[str, int]:
    """The tokens that stand for a text of their own, special or not, and their ids."""
    added: dict[str, int] = dict(tokenizer.get_added_vocab()) if hasattr(tokenizer, "get_added_vocab") else {}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


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

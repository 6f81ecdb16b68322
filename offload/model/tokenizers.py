"""The tokenizer of a checkpoint, of whichever kind it is: ``tokenizer.json``, sentencepiece, tiktoken, tekken.

transformers reads most of them. Two it does not: Kimi's tiktoken file, for which it would run code from the checkpoint,
and the chat template of a checkpoint that has Mistral's ``tekken.json`` alone, which mistral-common makes.
"""

from __future__ import annotations

import base64
import importlib.util
from pathlib import Path
from typing import Any

from offload.checkpoint.gguf_file import gguf_files
from offload.checkpoint.model_folder import read_json_object, side_folder
from offload.errors import ModelError

_FILES = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "tekken.json", "tokenizer_config.json", "vocab.json")
_CHAT_TEMPLATE = "chat_template.jinja"


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in the folder ``path``, or of the GGUF file ``path``; nothing of the checkpoint's code is run.

    Raises ModelError if there is none that can be used, naming the package that it needs where one is missing.
    """
    from transformers import AutoTokenizer, LlamaTokenizer

    folder = side_folder(path)
    there = {name for name in _FILES if (folder / name).exists()}
    try:
        if "tiktoken.model" in there and "tokenizer.json" not in there:
            return _tiktoken(folder)
        if there == {"tokenizer.model", "tokenizer_config.json"} and _is_llama(folder):
            # Auto takes the general class for some model types, which forgets the space before the first word
            return LlamaTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, mistral_format=False, **_gguf_file(path)
        )
    except Exception as error:
        raise ModelError(f"{path}: {_what_is_wrong(there, error)}") from error
    if "tekken.json" in there:
        _complete_tekken(tokenizer, folder)
    return tokenizer


def missing_template(path: Path) -> str | None:
    """Why the tokenizer of ``path`` has no chat template, if a package is all that is missing."""
    folder = side_folder(path)
    if (folder / "tekken.json").exists() and not _installed("mistral_common"):
        return (
            "the chat template of this model comes from the package mistral-common: pip install mistral-common pillow"
        )
    return None


def _gguf_file(path: Path) -> dict[str, str]:
    """A GGUF model has its tokenizer in its file, unless the original one is beside it."""
    if any((side_folder(path) / name).exists() for name in _FILES) or not (files := gguf_files(path)):
        return {}
    return {"gguf_file": files[0].name}


def _is_llama(folder: Path) -> bool:
    said = str(read_json_object(folder / "tokenizer_config.json").get("tokenizer_class"))
    return said in ("LlamaTokenizer", "LlamaTokenizerFast")


def _what_is_wrong(there: set[str], error: Exception) -> str:
    if "tokenizer.model" in there and "tokenizer.json" not in there:
        missing = [name for name, module in _SENTENCEPIECE.items() if not _installed(module)]
        if missing:
            return f"the tokenizer is a sentencepiece model and needs packages: pip install {' '.join(missing)}"
    reason = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in reason:
        return (
            "the tokenizer needs code of the checkpoint, which is not run; put a tokenizer.json of this model into the "
            "folder"
        )
    return f"the tokenizer cannot be loaded ({reason[:300]}); fetch the tokenizer's files again"


_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _complete_tekken(tokenizer: Any, folder: Path) -> None:
    """What a folder with nothing but ``tekken.json`` does not say: begin and end tokens, and the chat template."""
    tokenizer.bos_token = tokenizer.bos_token or "<s>"
    tokenizer.eos_token = tokenizer.eos_token or "</s>"
    if tokenizer.chat_template or not _installed("mistral_common"):
        return
    from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template

    tokenizer.chat_template = convert_tokenizer_to_chat_template(folder / "tekken.json")


_LETTERS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_KIMI_SPLIT = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS[0]}*{_LETTERS[1]}+{_ENDING}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS[0]}+{_LETTERS[1]}*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""How Kimi's texts are cut before tokens are looked for (Moonshot AI's ``tokenization_kimi.py``)."""
_KIMI_SPECIAL = 256


def _tiktoken(folder: Path) -> Any:
    """Kimi's tokenizer (Moonlight, Kimi Linear, K2): a line for each token with its bytes in base64 and its number.

    Behind them come 256 special tokens, named in ``tokenizer_config.json`` as far as they have a use.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    lines = (folder / "tiktoken.model").read_bytes().split(b"\n")
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    said = read_json_object(folder / "tokenizer_config.json")
    letters: dict[int, str] = bytes_to_unicode()  # a byte-level vocabulary has one for each byte
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [
        (spelled[left], spelled[right])
        for token in sorted(ranks, key=ranks.__getitem__)
        for left, right in sorted(_halves(token, ranks), key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    ]
    inner = Tokenizer(models.BPE({spelled[token]: rank for token, rank in ranks.items()}, merges, ignore_merges=True))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_KIMI_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    known = {int(number): token for number, token in said.get("added_tokens_decoder", {}).items()}
    for number in range(len(ranks), max(len(ranks) + _KIMI_SPECIAL, *known, 0)):
        token = known.get(number, {"content": f"<|reserved_token_{number}|>", "special": True})
        inner.add_tokens([AddedToken(token["content"], normalized=False, special=bool(token.get("special", True)))])
    names = {name: said[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token") if said.get(name)}
    template = folder / _CHAT_TEMPLATE
    chat = template.read_text(encoding="utf-8") if template.exists() else said.get("chat_template")
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=chat, **names)


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs of tokens that make up ``token``."""
    pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
    return [(left, right) for left, right in pairs if left in ranks and right in ranks]

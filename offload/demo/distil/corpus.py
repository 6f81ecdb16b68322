"""Training and held-out text: documents out of Debian packages, and the dense model's own conversations.

Every source is cut once: the first 85 % may be trained on, the last 13 % is held out, what lies between is not used.
"""

from __future__ import annotations

import glob
import gzip
import html
import json
import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGES = ("dict-gcide", "dict-wn", "dict-jargon", "dict-foldoc", "debian-handbook", "python3.11-doc", "fortunes")
SEQUENCE = 512  # tokens in a row of training text
_SHARE = {"gcide": 0.06, "wn": 0.06, "jargon": 0.2, "foldoc": 0.1, "handbook": 0.2, "pydoc": 0.13, "fortunes": 0.25}
_FORTUNES = """literature science people politics work wisdom humorists fortunes platitudes education kids love news
miscellaneous songs-poems"""


def fetch_packages(folder: Path) -> Path:
    """Download the Debian packages with `apt-get download` and unpack them below `folder`; nothing is installed."""
    packages, root = folder / "packages", folder / "root"
    packages.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=packages, check=True)
    for package in sorted(packages.glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(package), str(root)], check=True)
    return root


def _paragraphs(page: str) -> str:
    page = re.sub(r"(?s)<(script|style).*?</\1>", "", page)
    found = re.findall(r'(?s)<p[^>]*>(.*?)</p>|<div class="para">(.*?)</div>', page)
    return "\n".join(re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", a or b))).strip() for a, b in found)


def read_documents(root: Path) -> dict[str, str]:
    """Return one long text for each source below the unpacked packages' `root`."""
    share = root / "usr" / "share"

    def files(pattern: str) -> list[str]:
        return [Path(p).read_text(encoding="utf-8", errors="replace") for p in sorted(glob.glob(str(share / pattern)))]

    texts = {}
    for name in ("gcide", "wn", "jargon", "foldoc"):
        with gzip.open(share / "dictd" / f"{name}.dict.dz", "rt", encoding="utf-8", errors="replace") as source:
            texts[name] = source.read()
    texts["handbook"] = "\n\n".join(map(_paragraphs, files("doc/debian-handbook/html/en-US/*.html")))
    texts["pydoc"] = "\n\n".join(
        text for part in ("tutorial", "faq", "howto") for text in files(f"doc/python3.11/html/_sources/{part}/*.txt")
    )
    quotes = "\n".join(text for name in _FORTUNES.split() for text in files(f"games/fortunes/{name}"))
    texts["fortunes"] = re.sub(r"\n%\n", "\n\n", quotes)
    return texts


def text_rows(tokenizer: Any, documents: dict[str, str], rows: int, held_out: bool, seed: int = 0) -> Tensor:
    """Return int64 `[about rows, SEQUENCE]`: windows of the documents, in each source's share of the mix."""
    rng = random.Random(seed)
    out = []
    for name, share in _SHARE.items():
        text = documents[name]
        low, high = (int(len(text) * 0.87), len(text)) if held_out else (0, int(len(text) * 0.85))
        wanted, found = max(1, round(rows * share)), 0
        while found < wanted:
            start = text.find("\n", rng.randrange(low, high - 4000)) + 1
            window = text[start : min(start + 4000, high)]
            ids = tokenizer(window, add_special_tokens=False)["input_ids"][:SEQUENCE]
            if len(ids) == SEQUENCE:
                out.append(ids)
                found += 1
    rng.shuffle(out)
    return torch.tensor(out)


def chat_rows(tokenizer: Any, path: Path, held_out: bool, seed: int = 0) -> Tensor:
    """Return int64 `[rows, SEQUENCE]`: conversations of the file that `chat.generate` wrote, packed end to end.

    A row may start within a conversation, as a long context would show it; a shuffle by `seed` decides which stand
    together.
    """
    chats = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    chats = [chat for chat in chats if chat["split"] == ("held_out" if held_out else "train")]
    random.Random(seed).shuffle(chats)
    render: Callable[..., str] = tokenizer.apply_chat_template
    stream: list[int] = []
    for chat in chats:
        stream += tokenizer(render(chat["messages"], tokenize=False), add_special_tokens=False)["input_ids"]
    rows = len(stream) // SEQUENCE
    return torch.tensor(stream[: rows * SEQUENCE]).view(rows, SEQUENCE)

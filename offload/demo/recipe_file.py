"""Where the recipe lies and what its contents' hash is; imports nothing heavy."""

from __future__ import annotations

import hashlib
from pathlib import Path

RECIPE_PATH = Path(__file__).with_name("recipe.safetensors")


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

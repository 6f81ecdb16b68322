"""The header of a GGUF file: what it says about the model, and where its tensors are. Standard library only.

Source: the ggml repository's ``docs/gguf.md`` (versions 2 and 3, little-endian). The ``gguf`` package reads the same,
but maps the whole file, and takes seconds for a large vocabulary, which is skipped here.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from offload.errors import ModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_LONGEST_TEXT = 2**27
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """``shape`` has the fastest dimension last, as torch has it; ``kind`` is ggml's number; ``offset`` in the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """``metadata`` has numbers, texts and lists of numbers; of a list of texts its length."""

    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))


def read_header(path: Path) -> GgufHeader:
    """Raises ModelError if the file is damaged, or of a version that is not read here."""
    try:
        with open(path, "rb") as file:
            if file.read(4) != _MAGIC:
                raise ModelError(f"{path}: the file is no GGUF file, or damaged; download it again")
            (version,) = _unpack(file, "I")
            if version not in _VERSIONS:
                raise ModelError(f"{path}: GGUF version {version} is not supported; versions 2 and 3 are")
            tensor_count, value_count = _unpack(file, "QQ")
            metadata = {}
            for _ in range(value_count):
                name = _text(file)
                metadata[name] = _value(file, *_unpack(file, "I"))
            found = []
            for _ in range(tensor_count):
                name = _text(file)
                (dimensions,) = _unpack(file, "I")
                shape = tuple(reversed(_unpack(file, f"{min(dimensions, 8)}Q")))
                found.append((name, shape, *_unpack(file, "IQ")))
            alignment = int(metadata.get("general.alignment", 32))
            start = -(-file.tell() // alignment) * alignment
    except (OSError, EOFError, ValueError, KeyError, UnicodeDecodeError, struct.error) as error:
        raise ModelError(f"{path}: the GGUF file is damaged or incomplete ({error}); download it again") from error
    return GgufHeader(metadata, tuple(GgufTensor(name, shape, kind, start + at) for name, shape, kind, at in found))


def gguf_files(path: Path) -> tuple[Path, ...]:
    """The GGUF files of a model: ``path`` and the other parts that it was split into, or those of a folder.

    Empty if ``path`` is a folder without any. Raises ModelError if a part is missing, or a folder holds several models.
    """
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        firsts = [file for file in found if not (match := _PART.search(file.name)) or int(match[1]) == 1]
        firsts = [file for file in firsts if not file.name.startswith("mmproj")]
        if len(firsts) > 1:
            names = ", ".join(file.name for file in firsts[:4])
            raise ModelError(f"{path}: there are several GGUF models ({names}); name one: --model {firsts[0]}")
        if not firsts:
            return ()
        path = firsts[0]
    match = _PART.search(path.name)
    if match is None:
        return (path,)
    stem, count = path.name[: match.start()], int(match[2])
    parts = tuple(path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1))
    missing = [part for part in parts if not part.exists()]
    if missing:
        raise ModelError(f"{missing[0]}: this part of {count} of the GGUF model is missing; download it")
    return parts


def _unpack(file: IO[bytes], form: str) -> tuple[Any, ...]:
    form = f"<{form}"
    data = file.read(struct.calcsize(form))
    return struct.unpack(form, data)


def _text(file: IO[bytes]) -> str:
    (length,) = _unpack(file, "Q")
    if length > _LONGEST_TEXT:
        raise ValueError(f"a text of {length} bytes")
    data = file.read(length)
    if len(data) < length:
        raise EOFError("it ends inside a text")
    return data.decode("utf-8")


def _value(file: IO[bytes], kind: int) -> Any:
    if kind == _TEXT:
        return _text(file)
    if kind != _LIST:
        return _unpack(file, _NUMBERS[kind])[0]
    kind, count = _unpack(file, "IQ")
    if kind == _TEXT:
        for _ in range(count):
            (length,) = _unpack(file, "Q")
            file.seek(length, 1)
        return count
    return list(_unpack(file, f"{count}{_NUMBERS[kind]}"))

"""The tensors of a quantised checkpoint under the names that they would have if it were not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping

import torch

from offload.checkpoint.formats.packed import PackedMatrix, PackedTensor

Read = Callable[[str, slice], torch.Tensor]
"""(checkpoint tensor, rows) -> those rows."""


class PackedTensors:
    """``tensors`` by name. A name may be that of a checkpoint tensor, which then is one of the parts."""

    def __init__(self, tensors: Mapping[str, PackedTensor]) -> None:
        self.tensors = tensors
        self._decoding = threading.Lock()  # the loader has several threads, the plan counts one decoding

    def names(self, keys: Iterable[str]) -> list[str]:
        """The names of a checkpoint that holds the tensors ``keys``: parts left out, what they make up put in."""
        parts = {key for packed in self.tensors.values() for key in packed.keys}
        return [key for key in keys if key not in parts] + list(self.tensors)

    def matrix(self, name: str, expert: int | None, read: Read) -> PackedMatrix:
        """One matrix as it is published; ``expert`` picks it where they are stacked."""
        packed = self.tensors[name]
        rows = slice(None) if packed.experts is None or expert is None else slice(expert, expert + 1)
        parts = []
        for key, part in zip(packed.keys, packed.layout.parts, strict=False):
            found = read(key, rows)
            parts.append((found.view(part.dtype) if found.dtype != part.dtype else found).reshape(part.shape))
        parts += [torch.tensor([constant]) for constant in packed.constants]
        assert len(parts) == len(packed.layout.parts)
        return PackedMatrix(packed.layout, tuple(parts))

    def decoded(self, name: str, rows: slice, dtype: torch.dtype, read: Read) -> torch.Tensor:
        """``rows`` (along the first dimension) of a packed tensor, in memory of its own."""
        packed = self.tensors[name]
        if packed.experts is None:
            matrix = self.matrix(name, None, read)
            with self._decoding:
                return packed.layout.decode_rows(matrix.parts, rows, dtype)
        first, last, _ = rows.indices(packed.experts)
        out = torch.empty(last - first, *packed.layout.shape, dtype=dtype)
        for expert in range(first, last):
            matrix = self.matrix(name, expert, read)
            with self._decoding:
                packed.layout.decode(matrix.parts, out[expert - first])
        return out


class PackedSlice:
    """What transformers' loader takes for a tensor of a file: decoded when it is asked for with ``[...]``."""

    def __init__(self, decode: Callable[[], torch.Tensor]) -> None:
        self._decode = decode

    def __getitem__(self, index: object) -> torch.Tensor:
        return self._decode()

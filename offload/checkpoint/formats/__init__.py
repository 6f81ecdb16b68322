"""Weight formats by name."""

from __future__ import annotations

from offload.checkpoint.formats.base import TensorSpecs, WeightFormat
from offload.checkpoint.formats.native import NativeFormat
from offload.errors import UsageError

FORMATS: dict[str, WeightFormat] = {weight_format.name: weight_format for weight_format in (NativeFormat(),)}

__all__ = ["FORMATS", "TensorSpecs", "WeightFormat", "get_format"]


def get_format(name: str) -> WeightFormat:
    """Raises UsageError, naming the formats there are."""
    if name not in FORMATS:
        raise UsageError(f"--format: '{name}' is not one of {', '.join(FORMATS)}")
    return FORMATS[name]

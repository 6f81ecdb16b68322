"""Weight formats by name."""

from __future__ import annotations

from offload.checkpoint.formats.base import TensorSpecs, WeightFormat, Weights
from offload.checkpoint.formats.native import NativeFormat
from offload.checkpoint.formats.quantized import QuantizedFormat
from offload.errors import UsageError

FORMATS: dict[str, WeightFormat] = {
    weight_format.name: weight_format
    for weight_format in (
        NativeFormat(),
        QuantizedFormat("int8", "int8"),
        QuantizedFormat("int4", "int4-g64"),
        QuantizedFormat("int4-g32", "int4-g32"),
        QuantizedFormat("int4-g128", "int4-g128"),
        # an expert's last matrix is the one whose errors nothing averages out
        QuantizedFormat("mixed", "int4-g64", {"down_proj": "int8"}),
    )
}

__all__ = ["FORMATS", "NativeFormat", "TensorSpecs", "WeightFormat", "Weights", "get_format"]


def get_format(name: str) -> WeightFormat:
    """Raises UsageError, naming the formats there are."""
    if name not in FORMATS:
        raise UsageError(f"--format: '{name}' is not one of {', '.join(FORMATS)}")
    return FORMATS[name]

"""What a batch reads its rows from."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from offload.config import SamplingSettings
from offload.errors import RunLocalError
from offload.generation.batch_files import BatchInput

SAMPLING = SamplingSettings(max_new_tokens=9)


def test_a_gzip_file_is_read_as_what_is_in_it(tmp_path: Path) -> None:
    rows = b'{"prompt": "x"}\n\n{"prompt": "y"}'
    packed = tmp_path / "rows"  # what it is shows in its bytes, not in its name
    packed.write_bytes(gzip.compress(rows))
    zipped = BatchInput.open(str(packed))
    assert b"".join(zipped.lines()) == rows
    assert zipped.rows() == 2
    before = zipped.fingerprint()
    packed.write_bytes(packed.read_bytes() + gzip.compress(b'\n{"prompt": "z"}'))
    assert zipped.rows() == 3
    assert before is not None and zipped.fingerprint(before["bytes"]) == before, "rows may be added at the end"
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(RunLocalError, match="damaged gzip file"):
        list(zipped.lines())


def test_typical_tokens_are_those_of_nine_rows_in_ten(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": "x" * 286}) for _ in range(8)] + [json.dumps({"prompt": "x", "max_new_tokens": 5})]
    (tmp_path / "in").write_text("\n".join([*lines, json.dumps({"prompt": "x" * 9000})]))
    typical = BatchInput.open(str(tmp_path / "in")).typical_tokens(SAMPLING)
    assert typical == 9014 // 3 + 9  # of ten rows the longest: none is cut short
    assert BatchInput.open("-").typical_tokens(SAMPLING) is None

"""What the command line asks of a batch: where rows come from and go to, and how they run. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from offload.config import EngineSettings, SamplingSettings
from offload.errors import UsageError
from offload.generation.batch_files import (
    BatchInput,
    BatchOutput,
    StandardOutput,
    batch_settings,
    choose_seed,
    open_sink,
)
from offload.generation.batch_run import LOOKAHEAD, BatchOptions

_STREAMED_PROMPT_TOKENS = 256
"""Room for a prompt where none can be looked at before the model is loaded."""


@dataclass(frozen=True, slots=True)
class BatchJob:
    """``path`` None is standard output, ``total`` None a number of rows that is not known."""

    source: BatchInput
    path: Path | None
    resume: bool
    sampling: SamplingSettings
    seed: int
    total: int | None
    options: BatchOptions

    @property
    def can_resume(self) -> bool:
        return self.path is not None and not self.source.stream

    def engine_settings(self, settings: EngineSettings, batch_size: int | None) -> EngineSettings:
        """``settings`` for an engine that runs ``batch_size`` rows at once, None: as many as fit and pay."""
        tokens = self.source.typical_tokens(self.sampling) or self.sampling.max_new_tokens + _STREAMED_PROMPT_TOKENS
        return replace(settings, batch_rows=batch_size, row_tokens=tokens)

    def open_sink(self, settings: EngineSettings) -> BatchOutput | StandardOutput:
        """Raises UsageError."""
        return open_sink(self.path, self.resume, batch_settings(settings, self.sampling, self.seed), self.source)


def open_job(
    source: str, output: str, sampling: SamplingSettings, resume: bool, ordered: bool, max_errors: int | None
) -> BatchJob:
    """``source`` and ``output`` as on the command line: files, or ``-``. Raises UsageError."""
    if max_errors is not None and max_errors < 1:
        raise UsageError("--max-errors must be at least 1")
    rows = BatchInput.open(source)
    path = None if output == "-" else Path(output)
    seed = choose_seed(sampling.seed, path if resume else None)
    options = BatchOptions(ordered, max_errors, 1 if rows.stream else LOOKAHEAD)
    return BatchJob(rows, path, resume, sampling, seed, rows.rows(), options)

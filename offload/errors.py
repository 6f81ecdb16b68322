"""Errors that a user can act on: the message is one clear line that says what is wrong and what to do."""

from __future__ import annotations


class RunLocalError(Exception):
    """Base of every expected failure; front ends print the message alone and leave with ``exit_code``."""

    exit_code = 1


class UsageError(RunLocalError):
    """A flag, a value or an input file that makes no sense."""

    exit_code = 2


class ModelError(RunLocalError):
    """The checkpoint is missing, damaged or of a kind that cannot be run."""


class ExpertFileError(RunLocalError):
    """The expert file or its manifest is missing, damaged, or belongs to something else."""


class BudgetError(RunLocalError):
    """The budget cannot hold what must be resident; the message names the smallest one that works."""


class DeviceError(RunLocalError):
    """The device that was asked for is not there, or cannot be used."""


class ContextError(RunLocalError):
    """The prompt does not fit the context.

    ``prompt_tokens`` and ``context_tokens`` let a front end trim the conversation and try again.
    """

    def __init__(self, message: str, prompt_tokens: int, context_tokens: int) -> None:
        super().__init__(message)
        self.prompt_tokens = prompt_tokens
        self.context_tokens = context_tokens


class Cancelled(Exception):
    """Raised inside the engine to leave a forward pass early; never reaches a front end."""

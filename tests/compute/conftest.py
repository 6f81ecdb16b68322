"""The compiled kernels, where this machine can have them."""

from __future__ import annotations

import pytest

from offload.compute.kernels import Kernels, load_kernels


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    reasons: list[str] = []
    found = load_kernels(reasons.append)
    if found is None:
        pytest.skip(f"this machine has no compiled kernels: {reasons[0]}")
    return found


@pytest.fixture(params=["kernels", "torch"])
def either(request: pytest.FixtureRequest) -> Kernels | None:
    """The kernels, and None: what works without them works with them too."""
    return request.getfixturevalue("kernels") if request.param == "kernels" else None

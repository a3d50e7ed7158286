"""Fixtures of the ops' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from embkern.ops.library import CPU_CAPABILITIES, cpu_capability


@pytest.fixture(params=CPU_CAPABILITIES)
def level(request: pytest.FixtureRequest, native: str) -> Iterator[str]:
    """Every instruction set this processor has, one by one."""
    best = cpu_capability()
    if CPU_CAPABILITIES.index(request.param) > CPU_CAPABILITIES.index(best):
        pytest.skip(f"this processor has {best}")
    yield cpu_capability(request.param)
    cpu_capability(best)

"""What the tests of the ops share: instruction sets, and the bound of a single rounding."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import Tensor

from embkern.ops.library import CPU_CAPABILITIES, cpu_capability

from ..conftest import relative_error


@pytest.fixture(params=CPU_CAPABILITIES)
def level(request: pytest.FixtureRequest, native: str) -> Iterator[str]:
    """Every instruction set this processor has, one by one."""
    best = cpu_capability()
    if CPU_CAPABILITIES.index(request.param) > CPU_CAPABILITIES.index(best):
        pytest.skip(f"this processor has {best}")
    yield cpu_capability(request.param)
    cpu_capability(best)


def assert_rounded_once(got: Tensor, exact: Tensor) -> None:
    """Check 16-bit values against float64: two independent roundings have sqrt(2) times the error of one."""
    assert relative_error(got, exact) <= 1.2 * relative_error(exact.to(got.dtype), exact)

"""The Triton kernels run by Triton's interpreter on the CPU.

Triton decides when a kernel is defined whether it is compiled or interpreted, so these tests need a process
that starts with ``TRITON_INTERPRET=1`` (``make test-interpreter``); in any other they skip themselves.
The interpreter does not round bf16 as a device does: bf16 is left to the tests marked ``gpu``.
"""

from __future__ import annotations

import os

import numpy
import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton interprets kernels only with TRITON_INTERPRET=1", allow_module_level=True)


def _version(package: object) -> tuple[int, ...]:
    return tuple(map(int, package.__version__.split(".")[:2]))


if _version(triton) <= (3, 6) and _version(numpy) >= (2, 4):
    # It takes ``int`` of an array with one element, which NumPy 2.4 refuses.
    pytest.skip("the interpreter of Triton 3.6 does not run with NumPy 2.4", allow_module_level=True)

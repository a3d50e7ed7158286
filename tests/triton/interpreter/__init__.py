"""The Triton kernels run by Triton's interpreter on the CPU.

Triton decides when a kernel is defined whether it is compiled or interpreted, so these tests need a process
that starts with ``TRITON_INTERPRET=1`` (``make test-interpreter``); in any other they skip themselves.
The interpreter does not round bf16 as a device does: bf16 is left to the tests marked ``gpu``.
"""

from __future__ import annotations

import pytest

from benchmarks.tools.gpu_check.stand_in import interpreter_fails

if reason := interpreter_fails():
    pytest.skip(reason, allow_module_level=True)

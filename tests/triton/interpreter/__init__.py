"""The Triton kernels run by Triton's interpreter on the CPU.

Triton decides whether a kernel is compiled or interpreted when it is defined. These tests therefore need a
process that starts with ``TRITON_INTERPRET=1`` (``make test-interpreter``) and skip themselves in any other.
The interpreter does not round bf16 as a device does, so that only the tests marked ``gpu`` cover bf16.
"""

from __future__ import annotations

import pytest

from benchmarks.tools.gpu_check.stand_in import interpreter_fails

if reason := interpreter_fails():
    pytest.skip(reason, allow_module_level=True)

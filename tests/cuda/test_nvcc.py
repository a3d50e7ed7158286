"""Every CUDA source compiles for every architecture, without spills and with the expected instructions."""

from __future__ import annotations

import re

import pytest

from benchmarks.tools.nvcc_report import ARCHITECTURES, Kernel, find_cuobjdump, find_nvcc, report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc (CUDA_HOME or PATH)"),
]


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    return report()


def test_every_kernel_compiles_without_spills(kernels):
    assert {kernel.architecture for kernel in kernels} == set(ARCHITECTURES)
    for kernel in kernels:
        assert kernel.spill_stores == kernel.spill_loads == kernel.stack == 0, kernel
        assert 0 < kernel.registers <= 128, f"two blocks of 256 threads no longer fit: {kernel}"


@pytest.mark.skipif(find_cuobjdump() is None, reason="needs cuobjdump (the toolkit's or triton's)")
def test_the_expected_instructions(kernels):
    """Tensor cores, ldmatrix, cp.async and 16-byte accesses are used, and no atomics."""
    for architecture in ARCHITECTURES:
        of_architecture = [kernel for kernel in kernels if kernel.architecture == architecture]
        for part, instructions, count in (
            ("TensorCoreProduct", ("HMMA", "LDSM", "LDGSTS", "STG.E.128"), 4),
            ("FmaProduct", ("LDGSTS", "STG.E.128"), 4),
            ("gather_project_decode", ("LDG.E.128",), 12),
            (r"grad_(rows|basis)_kernel<StreamedTensorCores", ("HMMA", "LDSM", "LDGSTS"), 12),
            (r"grad_(rows|basis)_kernel<StreamedFma", ("LDGSTS", "LDS."), 4),
            ("(sum|join)_segments_kernel", ("LDG.E.128",), 8),
            ("sum_splits_kernel", (), 4),
            ("gather_decode_rows", ("LDS.",), 4),
            ("packed_logits_kernel", ("LDS.",), 21),
            ("packed_logits_states", (), 7),
            (r"cosine_mse_rows_kernel<\w+, \w+, true>", ("LDG.E.128", "STG.E.128"), 8),
            (r"cosine_mse_rows_kernel<\w+, \w+, false>", (), 8),
            ("cosine_mse_(loss|weights)_kernel", (), 4),
            ("scale_(all|rows)_kernel", ("LDG.E.128", "STG.E.128"), 8),
        ):
            matching = [kernel for kernel in of_architecture if re.search(part, kernel.name)]
            assert len(matching) == count, [kernel.name for kernel in of_architecture]
            for kernel in matching:
                for instruction in instructions:
                    assert kernel.instructions[instruction] > 0, f"{instruction} missing: {kernel}"
                assert kernel.instructions["LDL"] == kernel.instructions["STL"] == 0, (
                    f"local memory: {kernel}"
                )
                assert kernel.instructions["ATOM"] == kernel.instructions["RED."] == 0, f"atomics: {kernel}"

"""The CUDA kernels of scale_gradient_ on the emulator; see test_emulated_gather_project.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embkern.ops.reference import accumulation_dtype
from tests.cuda.emulated import DTYPES, MARKS, Outputs, build_sanitized, scale_gradient_call

pytestmark = MARKS
SHAPES = [(1, 1), (9, 45), (5, 64), (40, 300)]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sanitized("scale_gradient", tmp_path_factory.mktemp("sanitized"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by_row", [False, True], ids=["by one factor", "by row"])
@pytest.mark.parametrize("multiprocessors", [1, 132])  # with one, a block takes several steps
def test_each_product_is_rounded_once(program, dtype, by_row, multiprocessors, tmp_path):
    work, calls, expected = accumulation_dtype(dtype), [], []
    for N, H in SHAPES:
        for misaligned in (0, 1):
            grad = torch.randn(N, H).to(dtype)
            factor = torch.rand(N if by_row else (), dtype=work) * 3
            calls.append(scale_gradient_call(grad, factor, misaligned, multiprocessors))
            expected.append((grad.to(work) * (factor[:, None] if by_row else factor)).to(dtype))
    outputs = Outputs(program, calls, tmp_path)
    assert all(torch.equal(outputs.take(dtype, *each.shape), each) for each in expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_has_the_factor_one_keeps_its_bits(program, dtype, tmp_path):
    """A product by 1 would make a signalling NaN a quiet one."""
    exponent = torch.tensor(float("inf"), dtype=dtype).view(INTEGERS[dtype.itemsize])
    grad = torch.randn(8, 24).to(dtype)
    grad[::2] = (exponent + 1).view(dtype)
    factors = torch.full((8,), 2.0, dtype=accumulation_dtype(dtype))
    factors[::2] = 1
    calls = [
        scale_gradient_call(grad, factors, 0, 1),
        scale_gradient_call(grad[::2].clone(), factors[0], 0, 1),
    ]
    outputs = Outputs(program, calls, tmp_path)
    expected = grad.clone()
    expected[1::2] *= 2
    for each in (expected, grad[::2]):
        got = outputs.take(dtype, *each.shape)
        assert torch.equal(got.view(INTEGERS[dtype.itemsize]), each.view(INTEGERS[dtype.itemsize]))

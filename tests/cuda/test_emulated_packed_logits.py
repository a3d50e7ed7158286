"""The CUDA kernels of packed_logits, compiled for the CPU and run on the emulator: numbers, bounds, order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import assert_no_worse_over_draws, seed_of
from tests.cuda.emulated import DTYPES, MARKS, ORDERS, Outputs, packed_logits_call, programs
from tests.ops.packed_problems import Problem, problem

pytestmark = MARKS
program, sanitized_program = programs("packed_logits")

# (V, H, K, states): odd rows, no basis, a basis wider than the rows; one state, several, more than at a time.
SHAPES = [(301, 160, 128, 1), (97, 97, 96, 3), (70, 33, 32, 16), (200, 70, 0, 5), (64, 40, 64, 19)]


def run(program: Path, p: Problem, hidden: torch.Tensor, folder: Path, **options) -> torch.Tensor:
    call = packed_logits_call(hidden, *p.codes, p.scales, p.basis, p.offset, **options)
    outputs = Outputs(program, [call], folder)
    logits = outputs.take(hidden.dtype, len(hidden), len(p.scales))
    assert not outputs.data
    return logits


def check(program: Path, shape, dtype: torch.dtype, folder: Path, hidden_dtype=None, **options) -> None:
    V, H, K, states = shape

    def draw() -> tuple[list[torch.Tensor], ...]:
        p = problem((V, H, K, 1), dtype, offset=V % 2 == 1)
        hidden = torch.randn(states, H).to(hidden_dtype or dtype)

        def plain(cast: torch.dtype) -> torch.Tensor:
            rows = p.plain(torch.arange(V), *(each.to(cast) for each in p.factors))
            return F.linear(hidden.to(cast), rows)

        native = plain(dtype).to(hidden.dtype)
        return [run(program, p, hidden, folder, **options)], [native], [plain(torch.float64)]

    assert_no_worse_over_draws(draw)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_plain_torch(program, dtype, tmp_path):
    for shape in SHAPES:
        check(program, shape, dtype, tmp_path)


def test_hidden_states_of_another_dtype(program, tmp_path):
    check(program, SHAPES[1], torch.float32, tmp_path, torch.bfloat16)
    check(program, SHAPES[1], torch.bfloat16, tmp_path, torch.float32)
    check(program, SHAPES[1], torch.float16, tmp_path, torch.float64)


def test_the_same_bits_in_every_order_of_threads_and_for_any_blocks(program, tmp_path):
    for shape in (SHAPES[0], SHAPES[2]):
        found = []
        for order in ORDERS:
            for multiprocessors in (1, 132):
                torch.manual_seed(seed_of(0))
                p = problem((*shape[:3], 1), torch.bfloat16)
                hidden = torch.randn(shape[3], shape[1]).bfloat16()
                options = dict(order=order, multiprocessors=multiprocessors)
                found.append(run(program, p, hidden, tmp_path, **options))
        assert torch.isfinite(found[0]).all()
        assert all(torch.equal(found[0], other) for other in found[1:])


def test_no_access_out_of_bounds(sanitized_program, tmp_path):
    for shape in SHAPES:
        check(sanitized_program, shape, torch.float32, tmp_path)

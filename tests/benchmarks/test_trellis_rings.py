"""The rings of ExLlamaV3: codebook, paths, rate, bytes."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.trellis_rings import RING, coded_rings, mul1_levels, rotated, trellis_rings


def test_levels_are_nearly_normal_and_those_of_fp16():
    levels = mul1_levels()
    assert levels.shape == (65536,)
    assert torch.equal(levels, levels.half().float())
    assert abs(float(levels.mean())) < 0.02
    assert float(levels.std()) == pytest.approx(1, abs=0.05)
    # The bytes of window 0 add up to 0, those of window 1 are the multiplier's.
    step = float(levels[1] - levels[0]) / (0x83 + 0xDC + 0xD1 + 0x2D)
    assert step == pytest.approx(1 / math.sqrt(4 * (256**2 - 1) / 12), rel=0.02)  # four uniform bytes


def test_the_rotation_is_orthonormal_and_its_own_inverse():
    matrix = rotated(torch.eye(RING))
    assert torch.equal(matrix.abs(), torch.full_like(matrix, 1 / 16))
    assert torch.equal(matrix @ matrix, torch.eye(RING))


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_rings_close_and_come_near_the_bound_of_any_code(bits):
    samples = torch.randn(48, RING, generator=torch.Generator().manual_seed(0))
    states, scales, values = coded_rings(samples, bits)
    before = states.roll(1, 1)  # the window before a value: its own code is shifted in from below
    assert torch.equal(states >> bits, before & ((1 << (16 - bits)) - 1))
    assert torch.equal(values, mul1_levels()[states] * scales.float())
    rate = -10 * math.log10(float((samples - values).square().mean() / samples.square().mean()))
    bound = bits * 20 * math.log10(2)
    # Published for 2 bits: 0.44 dB below the bound. The standard error is 0.06 dB here.
    assert bound - 0.8 < rate < bound + 0.3


@pytest.mark.slow  # compiles
def test_rows_of_any_width_are_decoded_and_padding_costs_bytes():
    table = torch.randn(6, 300, generator=torch.Generator().manual_seed(1))
    table[3] = 0
    table[4] *= 1e-3
    found = trellis_rings(table, 2)
    assert found.nbytes == 6 * 2 * (RING * 2 // 8 + 2) + 2 * 2 * RING  # codes, scales, signs
    errors = (found.rows - table).norm(dim=1) / table.norm(dim=1).clamp_min(1e-12)
    assert found.rows.shape == table.shape
    assert torch.equal(found.rows[3], table[3])
    assert (errors[[0, 1, 2, 4, 5]] < 0.35).all()  # 2 bits leave 0.26

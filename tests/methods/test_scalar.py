"""``rtn`` and ``lloyd_max``: errors, bytes, and the choice of bits and group."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from embkern.methods.quantizer_levels import lloyd_max_levels
from embkern.methods.scalar import lloyd_max, rtn
from embkern.methods.storage import direction_error
from tests.methods.row_tables import dense, embeddings


@pytest.mark.parametrize("group", [None, 8, 10])
def test_round_to_nearest_is_within_half_a_step(group):
    table = embeddings()
    got = rtn(table, ratio=1.2, bits=8, group=group)
    assert got.facts["bits"] == 8
    for x, y in zip(table.split(got.facts["group"], 1), dense(got).split(got.facts["group"], 1), strict=True):
        low, high = x.aminmax(dim=1, keepdim=True)
        step = (high - low) / 255
        rounding = 2**-11 * (low.abs() + high - low)  # minimum and scale are rounded to fp16
        assert ((x - y).abs() <= (0.5 + 1e-3) * step + rounding).all()


def test_the_bytes_of_quantised_rows():
    table = embeddings(101, 33)
    got = rtn(table, ratio=2, bits=3, group=10)  # four groups, of 10, 10, 10 and 3
    codes, scales = math.ceil(101 * 33 * 3 / 8), 101 * 4 * 2
    assert got.nbytes == codes + 2 * scales
    assert lloyd_max(table, ratio=2, bits=3, group=10).nbytes == codes + scales + 8 * 2


def test_a_table_on_the_grid_is_exact():
    codes = torch.randint(0, 16, (50, 64)).float()
    codes[:, 0], codes[:, 1] = 0, 15
    assert torch.equal(dense(rtn(codes / 8 - 1, ratio=4, bits=4)), codes / 8 - 1)
    signs = torch.randn(50, 64).sign() * 2.0 ** torch.randint(-4, 4, (50, 1))
    assert_close(dense(lloyd_max(signs, ratio=20)), signs, rtol=2**-11, atol=0)


def test_lloyd_max_with_a_searched_scale_beats_round_to_nearest_and_the_plain_scale():
    table = torch.randn(500, 64)
    for bits in (2, 3, 4):
        searched = dense(lloyd_max(table, ratio=4, bits=bits, group=64))
        levels = lloyd_max_levels(bits).float()
        spread = table.square().mean(1, keepdim=True).sqrt()
        plain = levels[torch.bucketize(table / spread, (levels[1:] + levels[:-1]) / 2)] * spread
        assert direction_error(table, searched) < direction_error(table, plain)
        assert direction_error(table, searched) < direction_error(
            table, dense(rtn(table, ratio=4, bits=bits, group=64))
        )


def test_bits_and_group_are_the_best_that_fit():
    table = embeddings(800, 96)
    table[:, ::32] *= 20  # outliers make the scales of small groups worth their bytes
    for method in (rtn, lloyd_max):
        best = direction_error(table, dense(method(table, ratio=6)))
        for bits, group in itertools.product((2, 3, 4), (32, 64, 96)):
            try:
                other = method(table, ratio=6, bits=bits, group=group)
            except ValueError:
                continue
            assert best <= direction_error(table, dense(other)) * 1.001

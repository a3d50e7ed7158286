"""Options, row weights and sizes that all methods share."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from embkern.methods import DirectionOptions, rank_for_ratio
from embkern.methods.base import byte_budget, check_table, parse_options, row_weights


def test_rank_for_ratio():
    assert rank_for_ratio(30522, 768, 2.5, offset=False) == 299
    assert rank_for_ratio(30522, 768, 5, offset=False) == 149
    assert rank_for_ratio(30522, 768, 10, offset=False) == 74
    for offset in (True, False):
        for ratio in (1.0, 3.7, 50.0):
            rank = rank_for_ratio(5000, 64, ratio, offset=offset)
            size = rank * (5000 + 64) + 64 * offset
            assert size * ratio <= 5000 * 64
            assert rank == 64 or (size + 5064) * ratio > 5000 * 64
    with pytest.raises(ValueError, match="ratio: expected at least 1 .* got 0.5"):
        rank_for_ratio(100, 10, 0.5, offset=False)
    with pytest.raises(ValueError, match="ratio: expected at least 1 .* got nan"):
        rank_for_ratio(100, 10, float("nan"), offset=False)
    for V, H in ((123, 64), (30522, 384), (7, 5), (151, 33)):
        for rank in range(1, H + 1):
            exact = V * H / (rank * (V + H))  # a rank's own ratio gives it back
            assert exact < 1 or rank_for_ratio(V, H, exact, offset=False) == rank
    with pytest.raises(ValueError, match="leaves no room for rank 1 .* the highest that fits is 9.09"):
        rank_for_ratio(100, 10, 10, offset=False)
    for V, H in ((123, 64), (1000, 277), (30522, 384)):
        with pytest.raises(ValueError, match="the highest that fits is") as refused:
            rank_for_ratio(V, H, 1e6, offset=True)
        assert rank_for_ratio(V, H, float(str(refused.value).split()[-1]), offset=True) == 1
    with pytest.raises(ValueError, match="cannot be factorised smaller"):
        rank_for_ratio(1, 10, 1, offset=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, r"direction: max_steps: [^(]* got 0$"),
        (
            {"rank": 3},
            r"direction: rank: Extra inputs are not permitted, got 3 \(known: cosine_weight, .*\)$",
        ),
        ({"cosine_weight": math.inf}, "direction: cosine_weight: Input should be a finite number, got inf"),
        ({"tolerance": math.nan}, "direction: tolerance: .* got nan"),
        ({"cosine_weight": 0}, "direction: cosine_weight, mse_weight: expected one above 0, got two zeros"),
        ({"max_steps": 0, "exponent": -1}, "exponent: .* got -1; max_steps: .* got 0"),
    ],
)
def test_wrong_options_raise_one_error_that_names_them(options, message):
    with pytest.raises(ValueError, match=message) as raised:
        parse_options(DirectionOptions, options, "direction")
    assert raised.value.__suppress_context__, "the error of pydantic would be a second traceback"


def test_row_weights_are_powers_of_counts_and_add_up_to_one():
    counts = torch.tensor([1.0, 0.0, 4.0, 16.0])
    assert_close(row_weights(counts, 4, 0.5), torch.tensor([1, 0, 2, 4], dtype=torch.float64) / 7)
    assert torch.equal(row_weights(counts, 4, 0.0), row_weights(None, 4))
    assert_close(row_weights(1e300 * counts.double(), 4, 2.0), row_weights(counts, 4, 2.0))  # no overflow


def test_what_is_no_tensor_is_named():
    with pytest.raises(TypeError, match=r"table: expected a tensor \(V, H\) or a TableFile, got ndarray"):
        check_table(np.zeros((4, 8), np.float32))
    with pytest.raises(TypeError, match=r"counts: expected a tensor \(2,\), got list"):
        row_weights([1.0, 2.0], 2)


def test_the_budget_of_an_exact_ratio_is_exact():
    table = torch.zeros(7, 9)  # 252 bytes
    for size in range(1, 253):
        assert byte_budget(table, 252 / size) == size
    with pytest.raises(ValueError, match="ratio: expected at least 1 .* got 0.5"):
        byte_budget(table, 0.5)

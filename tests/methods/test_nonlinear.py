"""``nonlinear_autoencoder``: its size, its best epoch, and a table that linear methods cannot fit."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from embkern.methods.nonlinear import nonlinear_autoencoder
from embkern.methods.storage import direction_error
from tests.methods.row_tables import dense, embeddings


def test_it_fits_a_curve_better_than_a_linear_method():
    angle = torch.rand(3000, 1) * 2 * math.pi
    frequencies = torch.arange(1, 5)
    table = torch.cat(
        [(angle * frequencies).cos(), (angle * frequencies).sin()], 1
    )  # a curve in 8 dimensions
    got = nonlinear_autoencoder(table, ratio=2, epochs=20, batch_size=64, lr=2e-3)
    r = got.facts["r"]
    left, values, right = torch.linalg.svd(table, full_matrices=False)
    linear = (left[:, :r] * values[:r]) @ right[:r]
    assert direction_error(table, dense(got)) < 0.7 * direction_error(table, linear)


def test_r_is_the_largest_and_norms_are_kept():
    table = embeddings(400, 16)
    got = nonlinear_autoencoder(table, ratio=2, epochs=1, batch_size=64)
    r = got.facts["r"]

    def values(r):
        return 400 * r + 400 + (r + 1) * 2 * r + (2 * r + 1) * 4 * r + (4 * r + 1) * 16

    assert got.nbytes == 4 * values(r) <= table.nbytes / 2 < 4 * values(r + 1)
    assert_close(dense(got).norm(dim=1), table.norm(dim=1))
    halves = nonlinear_autoencoder(table, ratio=2, epochs=1, batch_size=64, storage="float16")
    assert halves.facts["r"] > r
    assert halves.nbytes == 2 * values(halves.facts["r"])


def test_the_best_epoch_is_kept():
    table = embeddings(200, 8)
    got = nonlinear_autoencoder(table, ratio=2, epochs=9, batch_size=16, lr=0.15)
    errors = got.facts["direction_errors"]
    assert len(errors) == 9
    assert min(errors) < 0.99 * errors[-1]  # otherwise the last epoch is the best, and the test shows nothing
    assert direction_error(table, dense(got)) == pytest.approx(min(errors), rel=1e-4)
    with torch.no_grad():
        assert nonlinear_autoencoder(table, ratio=2, epochs=1).facts["r"] == got.facts["r"]

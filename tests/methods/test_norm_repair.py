"""``repair_norms``: the best length of every row, without a change of direction."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from embkern.methods import autoencoder, repair_norms
from embkern.methods.direction import direction
from embkern.tables.factors import Factors
from tests.methods.tables import anisotropic


def test_repaired_rows_are_the_nearest_multiples():
    table = anisotropic(200, 10) + 0.3
    factors = autoencoder(table, 3, epochs=2, progress=False)
    repaired = repair_norms(table, factors)
    y, z = factors.to_dense().double(), repaired.to_dense().double()
    x = table.double()
    assert_close(z, y * ((x * y).sum(1) / (y * y).sum(1)).unsqueeze(1), atol=1e-5, rtol=1e-5)
    assert (x - z).norm() < (x - y).norm()
    assert (repaired.rank, repaired.offset) == (4, None)
    # A projection already has the best lengths.
    projected = direction(table, 3)
    assert_close(repair_norms(table, projected).codes, projected.codes, atol=1e-5, rtol=1e-4)
    halved = Factors(projected.codes / 2, projected.basis)
    assert_close(repair_norms(table, halved).codes, projected.codes, atol=1e-5, rtol=1e-4)
    assert not repair_norms(table, Factors(0 * projected.codes, projected.basis)).codes.any()


def test_wrong_arguments_are_named():
    table = torch.randn(5, 4)
    with pytest.raises(ValueError, match="factors: expected linear ones, got the activation 'elu'"):
        repair_norms(table, Factors(torch.ones(5, 2), torch.ones(2, 4), activation="elu"))
    with pytest.raises(ValueError, match=r"table: expected shape \(6, 4\), got \(5, 4\)"):
        repair_norms(table, Factors(torch.ones(6, 2), torch.ones(2, 4)))

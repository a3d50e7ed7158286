"""``solve_direction``: its optimum and its bound, against brute force."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from embkern.methods.direction_solver import solve_direction
from tests.methods.tables import anisotropic


def objective(table, basis, a, b):
    x = table.double()
    y = x @ basis @ basis.t()
    return float((a * (1 - F.cosine_similarity(x, y, dim=1, eps=0)) + b * (x - y).square().sum(1)).sum())


@pytest.mark.parametrize("rank", [1, 7, 23])
@pytest.mark.parametrize(("cosine", "squared"), [(1, 0), (1, 0.3), (0, 1)])
def test_no_other_basis_is_better_than_the_certificate_allows(rank, cosine, squared):
    table, weight = anisotropic(3000, 24), torch.rand(3000, dtype=torch.float64)
    a, b = cosine * weight, squared * weight
    found = solve_direction(table, rank, a, b)
    rounding = 5e-8 * float((a + b * table.double().square().sum(1)).sum())
    # Many rows are nearly orthogonal to a line, so mixtures of lines are much better.
    if rank > 1 or not cosine:
        assert found.converged
        assert found.gap <= max(1e-6 * found.objective, rounding)
    assert_close(found.objective, objective(table, found.basis, a, b), rtol=0, atol=rounding)
    assert_close(found.basis.t() @ found.basis, torch.eye(rank, dtype=torch.float64))
    least = found.objective - found.gap - rounding
    for size in (1e-3, 1e-2, 1.0):
        other = torch.linalg.qr(found.basis + size * torch.randn_like(found.basis)).Q
        assert objective(table, other, a, b) >= least
    normal = torch.linalg.svd(weight.sqrt().unsqueeze(1) * table.double(), full_matrices=False).Vh
    assert objective(table, normal[:rank].t(), a, b) >= least


def test_a_line_in_the_plane_is_within_its_gap_of_the_best_of_all_angles():
    """The problem is not convex in Q: in 5 of 100 draws another angle is better, by at most 1/300."""
    table = (
        torch.randn(60, 2, dtype=torch.float64)
        * torch.tensor([1.0, 0.6])
        @ torch.linalg.qr(torch.randn(2, 2)).Q.double()
    )
    a, b = torch.rand(2, 60, dtype=torch.float64)
    angles = torch.linspace(0, math.pi, 100_001, dtype=torch.float64)
    lines = torch.stack([angles.cos(), angles.sin()])
    cosines = (table @ lines).abs() / table.norm(dim=1, keepdim=True)
    values = a @ (1 - cosines) + (b * table.square().sum(1)) @ (1 - cosines.square())
    found = solve_direction(table, 1, a, b)
    best = float(values.min())
    assert found.objective - found.gap <= best + 1e-12
    assert found.objective >= best * (1 - 1e-9)  # the angles are 3e-5 apart
    assert found.objective <= best * (1 + 1e-2)
    if found.converged:
        assert_close(found.objective, best, rtol=1e-6, atol=0)


def test_the_bound_holds_where_projections_vanish():
    # Along either axis one row vanishes, and undamped steps would alternate between the axes.
    table = torch.tensor([[1, 0], [0, 1], [1, 1], [1, -1]], dtype=torch.float64)
    ones = torch.ones(4, dtype=torch.float64)
    found = solve_direction(table, 1, ones, 0 * ones)
    best = 4 - 2 * (math.cos(math.pi / 8) + math.sin(math.pi / 8))  # at 22.5 degrees, by brute force
    assert found.objective - found.gap <= best
    assert not found.converged
    assert found.steps <= 50

"""The direction solver: best by brute force and by its certificate; odd tables, files, several ranks."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.testing import assert_close

from embkern.io.mapped_table import TableFile
from embkern.methods import autoencoder, repair_norms, svd
from embkern.methods.direction import direction
from embkern.methods.direction_solver import solve_direction
from embkern.methods.sharded import World
from embkern.tables.factors import Factors

SHARDS = 8


def anisotropic(V, H, dtype=torch.float32):
    """Rows of a decaying spectrum and of lengths that differ, as embeddings have them."""
    rows = torch.randn(V, H, dtype=torch.float64) * torch.logspace(0, -1, H, dtype=torch.float64)
    return (rows * torch.rand(V, 1, dtype=torch.float64).add(0.2)).to(dtype)


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
    if rank > 1 or not cosine:  # many rows are nearly orthogonal to a line: mixtures of lines do much better
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
    """The cosine is not convex: in 5 of 100 draws another angle is better, by a 300th at most."""
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


def test_squared_error_alone_is_the_weighted_svd():
    table, weight = anisotropic(500, 12), torch.rand(500)
    factors = direction(table, 4, row_weight=weight, cosine_weight=0, mse_weight=1)
    _, S, Vh = torch.linalg.svd(weight.double().sqrt().unsqueeze(1) * table.double(), full_matrices=False)
    assert_close(factors.to_dense().double(), table.double() @ Vh[:4].t() @ Vh[:4], atol=1e-5, rtol=1e-4)
    assert_close(factors.facts["objective"], float(S[4:].square().sum() / weight.sum()), rtol=1e-5, atol=0)
    assert factors.facts["steps"] == 1


def test_it_beats_svd_and_keeps_its_columns_in_order():
    table = anisotropic(2000, 16)
    ours, theirs = direction(table, 5), svd(table, 5)
    errors = [1 - F.cosine_similarity(table, each.to_dense(), dim=1).mean() for each in (ours, theirs)]
    assert errors[0] < errors[1]
    assert_close(ours.facts["objective"], float(errors[0]), rtol=1e-4, atol=0)
    assert_close(ours.basis @ ours.basis.t(), torch.eye(5))
    basis, x = ours.basis.double(), table.double()
    weight = 1 / (x.norm(dim=1) * (x @ basis.t()).norm(dim=1))
    inner = basis @ (x.t() * weight) @ x @ basis.t()
    assert_close(inner, inner.diag().sort(descending=True).values.diag(), atol=1e-2, rtol=0)


def test_where_projections_vanish_the_guard_holds_and_the_bound_stays_true():
    # Along either axis one of the rows is lost, and an eigen-step only turns from one to the other.
    table = torch.tensor([[1, 0], [0, 1], [1, 1], [1, -1]], dtype=torch.float64)
    ones = torch.ones(4, dtype=torch.float64)
    found = solve_direction(table, 1, ones, 0 * ones)
    best = 4 - 2 * (math.cos(math.pi / 8) + math.sin(math.pi / 8))  # by brute force, at 22.5 degrees
    assert found.objective - found.gap <= best
    assert not found.converged
    assert found.steps <= 50


ONE_HOT, EQUAL = torch.eye(6), torch.tensor([3.0, 4.0, 0.0]).repeat(7, 1)


@pytest.mark.parametrize(
    ("table", "rank", "error"),
    [
        (torch.tensor([[3.0, 4.0]]), 1, 0),
        (torch.tensor([[3.0, 4.0, 5.0]]), 3, 0),
        (torch.randn(3, 8), 6, 0),
        (torch.randn(5, 5), 5, 0),
        (EQUAL, 1, 0),
        (EQUAL, 2, 0),
        (torch.zeros(4, 3), 2, 0),
        (torch.cat([EQUAL, torch.zeros(2, 3)]), 1, 0),
        (ONE_HOT, 6, 0),
        (ONE_HOT, 2, 2 / 3),
    ],
    ids=[
        "V1",
        "V1 full",
        "V<r",
        "full",
        "equal",
        "equal r2",
        "zeros",
        "some zeros",
        "one-hot full",
        "one-hot",
    ],
)
def test_odd_tables(poisoned, table, rank, error):
    factors = direction(table, rank)
    dense = factors.to_dense()
    assert torch.isfinite(dense).all()
    assert factors.rank == rank
    assert_close(factors.basis @ factors.basis.t(), torch.eye(rank))
    if error == 0:
        assert_close(dense, table, atol=1e-5, rtol=1e-5)
        assert factors.facts["converged"]
    assert 0 <= factors.facts["objective"] <= error + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_lengths_of_all_sizes_change_nothing_but_lengths(dtype):
    table = F.normalize(anisotropic(400, 8, torch.float64)).to(dtype)
    lengths = 2.0 ** torch.randint(-66, 67, (400, 1)).to(dtype)  # 1e-20 to 1e20, exactly
    plain, scaled = direction(table, 3), direction(table * lengths, 3)
    assert {tensor.dtype for tensor in scaled.tensors().values()} == {dtype}
    assert_close(scaled.facts["objective"], plain.facts["objective"], rtol=1e-5, atol=0)
    assert scaled.facts["converged"] == plain.facts["converged"]
    y, exact = scaled.to_dense() / lengths, plain.to_dense()
    assert_close(y, exact, atol=4e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)
    squared = direction(table * lengths, 3, cosine_weight=0, mse_weight=1)
    assert all(torch.isfinite(tensor).all() for tensor in squared.tensors().values())


def test_counts_pull_the_subspace_to_what_is_read():
    table = anisotropic(600, 12)
    counts = torch.arange(1, 601, dtype=torch.float64).reciprocal()
    error = {
        name: 1 - F.cosine_similarity(table, direction(table, 3, counts=counts, exponent=a).to_dense(), dim=1)
        for name, a in {"alike": 0, "root": 0.5, "full": 1}.items()
    }
    weighted = {name: float((each * counts).sum()) for name, each in error.items()}
    assert weighted["full"] < weighted["root"] < weighted["alike"]
    assert torch.equal(direction(table, 3, counts=counts, exponent=0).codes, direction(table, 3).codes)
    # Only relative frequencies matter, and counts to a power are row weights.
    powered = direction(table, 3, row_weight=counts.sqrt())
    assert_close(direction(table, 3, counts=1000 * counts, exponent=0.5).to_dense(), powered.to_dense())


def test_rows_of_no_weight_have_no_say():
    table = anisotropic(50, 6)
    weight = torch.ones(50)
    weight[10:] = 0
    assert_close(
        direction(table, 2, row_weight=weight).basis, direction(table[:10], 2).basis, atol=1e-4, rtol=0
    )


def test_center_keeps_the_weighted_mean_as_the_offset():
    table, weight = anisotropic(300, 8) + torch.arange(8), torch.rand(300, dtype=torch.float64)
    factors = direction(table, 3, center=True, row_weight=weight)
    mean = (weight @ table.double()) / weight.sum()
    assert_close(factors.offset.double(), mean, atol=1e-5, rtol=1e-5)
    centered = direction(table - factors.offset, 3, row_weight=weight)
    assert_close(factors.to_dense(), centered.to_dense() + factors.offset, atol=1e-4, rtol=0)
    assert_close(factors.facts["objective"], centered.facts["objective"], rtol=1e-5, atol=0)


def test_facts_are_kept_by_to_and_not_saved(tmp_path):
    factors = direction(anisotropic(40, 6), 2)
    assert set(factors.facts) == {"objective", "gap", "steps", "converged"}
    assert factors.to(torch.bfloat16).facts == factors.facts
    factors.save(tmp_path / "f")
    assert Factors.load(tmp_path / "f").facts == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_file_gives_the_same_bits(tmp_path, dtype):
    table = anisotropic(9000, 20, dtype)  # two blocks
    save_file({"t": table}, tmp_path / "t")
    for options in ({}, {"center": True, "mse_weight": 0.5}):
        inside, outside = (direction(rows, 6, **options) for rows in (table, TableFile(tmp_path / "t", "t")))
        assert all(torch.equal(t, outside.tensors()[name]) for name, t in inside.tensors().items())
        assert inside.facts == outside.facts


RESIDENT = """
import resource, sys
from embkern.methods import direction
from embkern.io.mapped_table import TableFile
direction(TableFile(sys.argv[1], "small"), 2, max_steps=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
direction(TableFile(sys.argv[1], "t"), 2, max_steps=1)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_a_table_in_a_file_is_never_whole_in_memory(tmp_path):
    table = torch.randn(2**17, 256)  # 134 MB
    save_file({"t": table, "small": table[:20_000].clone()}, tmp_path / "t")
    command = [sys.executable, "-c", RESIDENT, tmp_path / "t"]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < table.nbytes / 4


WORKER = """
import sys
from embkern.methods import direction
from embkern.methods.sharded import joined
from embkern.io.mapped_table import TableFile

with joined(int(sys.argv[2])) as world:
    for name, options in eval(sys.argv[3]):
        factors = direction(TableFile(sys.argv[1], name), 3, world=world, **options)
        factors.save(f"{sys.argv[1]}.{name}.{world.rank}")
        print(factors.facts)
"""


def test_any_number_of_ranks_gives_the_same_bits(tmp_path):
    table = anisotropic(403, 10)
    save_file({"t": table, "few": table[:5].clone()}, tmp_path / "t")
    runs = [("t", dict(center=True, mse_weight=0.1)), ("few", {})]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, tmp_path / "t", str(SHARDS), str(runs)],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outcomes = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outcomes
    expected = []
    for name, options in runs:
        alone = direction(TableFile(tmp_path / "t", name), 3, world=World(SHARDS), **options)
        expected.append(str(alone.facts))
        for rank in range(2):
            shared = Factors.load(tmp_path / f"t.{name}.{rank}").tensors()
            assert all(torch.equal(tensor, shared[key]) for key, tensor in alone.tensors().items())
        plain = direction(TableFile(tmp_path / "t", name), 3, **options)
        assert_close(alone.to_dense(), plain.to_dense(), atol=1e-4, rtol=0)
    # The gloo of torch 2.10 prints of its connections where results belong.
    printed = [[line for line in out.splitlines() if not line.startswith("[Gloo]")] for out, _ in outcomes]
    assert printed == [expected] * 2


def test_repaired_norms_are_the_nearest_and_turn_nothing():
    table = anisotropic(200, 10) + 0.3
    factors = autoencoder(table, 3, epochs=2, progress=False)
    repaired = repair_norms(table, factors)
    y, z = factors.to_dense().double(), repaired.to_dense().double()
    x = table.double()
    assert_close(z, y * ((x * y).sum(1) / (y * y).sum(1)).unsqueeze(1), atol=1e-5, rtol=1e-5)
    assert (x - z).norm() < (x - y).norm()
    assert (repaired.rank, repaired.offset) == (4, None)
    # A projection has the best lengths already.
    projected = direction(table, 3)
    assert_close(repair_norms(table, projected).codes, projected.codes, atol=1e-5, rtol=1e-4)
    halved = Factors(projected.codes / 2, projected.basis)
    assert_close(repair_norms(table, halved).codes, projected.codes, atol=1e-5, rtol=1e-4)
    assert not repair_norms(table, Factors(0 * projected.codes, projected.basis)).codes.any()


def test_repairing_refuses_what_it_cannot_rescale():
    table = torch.randn(5, 4)
    with pytest.raises(ValueError, match="factors: expected linear ones, got the activation 'elu'"):
        repair_norms(table, Factors(torch.ones(5, 2), torch.ones(2, 4), activation="elu"))
    with pytest.raises(ValueError, match=r"table: expected shape \(6, 4\), got \(5, 4\)"):
        repair_norms(table, Factors(torch.ones(6, 2), torch.ones(2, 4)))


@pytest.mark.parametrize(
    ("table", "rank", "options", "error", "message"),
    [
        (torch.zeros(5, 4), 0, {}, ValueError, "rank: expected 1 <= rank <= H = 4, got 0"),
        (torch.zeros(5, 4), 5, {}, ValueError, "got 5"),
        (torch.zeros(5), 1, {}, ValueError, r"table: expected shape \(V, H\)"),
        (torch.zeros(5, 4).int(), 1, {}, TypeError, "table: expected a floating-point dtype"),
        (torch.tensor([[1.0], [float("nan")]]), 1, {}, ValueError, "in 1 row.s.: 1"),
        (torch.ones(5, 4), 1, {"mse_weight": -1}, ValueError, "direction: mse_weight: .* got -1"),
        (torch.ones(5, 4), 1, {"cosine_weight": 0}, ValueError, "expected one above 0, got two zeros"),
        (torch.ones(5, 4), 1, {"epochs": 3}, ValueError, "direction: epochs: Extra .*known: cosine_weight"),
        (torch.ones(5, 4), 1, {"counts": torch.ones(4)}, ValueError, r"counts: expected shape \(5,\)"),
        (
            torch.ones(2, 4),
            1,
            {"counts": torch.tensor([1.0, -2.0])},
            ValueError,
            "counts: .* at least 0, got -2",
        ),
        (
            torch.ones(2, 4),
            1,
            {"row_weight": torch.tensor([1, math.nan])},
            ValueError,
            "row_weight: .*finite",
        ),
        (torch.ones(2, 4), 1, {"row_weight": torch.zeros(2)}, ValueError, "row_weight: expected one above 0"),
        (torch.ones(2, 4), 1, {"counts": torch.ones(2), "row_weight": torch.ones(2)}, ValueError, "got both"),
    ],
)
def test_bad_arguments_are_named(table, rank, options, error, message):
    with pytest.raises(error, match=message):
        direction(table, rank, **options)

"""``direction``: what the factors minimise; unusual tables, tables in files, several processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.testing import assert_close

from embkern.io.mapped_table import TableFile
from embkern.methods import svd
from embkern.methods.direction import direction
from embkern.methods.sharded import World
from embkern.tables.factors import Factors
from tests.methods.processes import environments
from tests.methods.tables import anisotropic

SHARDS = 8


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
def test_the_lengths_of_rows_do_not_change_their_directions(dtype):
    table = F.normalize(anisotropic(400, 8, torch.float64)).to(dtype)
    # Powers of two from 1e-20 to 1e20, so that scaling is exact.
    lengths = 2.0 ** torch.randint(-66, 67, (400, 1)).to(dtype)
    plain, scaled = direction(table, 3), direction(table * lengths, 3)
    assert {tensor.dtype for tensor in scaled.tensors().values()} == {dtype}
    assert_close(scaled.facts["objective"], plain.facts["objective"], rtol=1e-5, atol=0)
    assert scaled.facts["converged"] == plain.facts["converged"]
    y, exact = scaled.to_dense() / lengths, plain.to_dense()
    assert_close(y, exact, atol=4e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)
    squared = direction(table * lengths, 3, cosine_weight=0, mse_weight=1)
    assert all(torch.isfinite(tensor).all() for tensor in squared.tensors().values())


def test_counts_lower_the_weighted_error():
    table = anisotropic(600, 12)
    counts = torch.arange(1, 601, dtype=torch.float64).reciprocal()
    error = {
        name: 1 - F.cosine_similarity(table, direction(table, 3, counts=counts, exponent=a).to_dense(), dim=1)
        for name, a in {"alike": 0, "root": 0.5, "full": 1}.items()
    }
    weighted = {name: float((each * counts).sum()) for name, each in error.items()}
    assert weighted["full"] < weighted["root"] < weighted["alike"]
    assert torch.equal(direction(table, 3, counts=counts, exponent=0).codes, direction(table, 3).codes)
    # Only relative counts matter, and counts to a power are row weights.
    powered = direction(table, 3, row_weight=counts.sqrt())
    assert_close(direction(table, 3, counts=1000 * counts, exponent=0.5).to_dense(), powered.to_dense())


def test_rows_with_a_weight_of_zero_do_not_matter():
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
    table = anisotropic(9000, 20, dtype)  # more than one block
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
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, tmp_path / "t", str(SHARDS), str(runs)],
            env={**os.environ, **each},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for each in environments(2)
    ]
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
    # The gloo of torch 2.10 prints its connections to stdout.
    printed = [[line for line in out.splitlines() if not line.startswith("[Gloo]")] for out, _ in outcomes]
    assert printed == [expected] * 2


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

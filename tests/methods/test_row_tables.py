"""Methods that make row tables: bytes within the budget, reproducible bits, errors that name arguments."""

from __future__ import annotations

import math

import pytest
import torch

from embkern import Recipe
from embkern.fidelity import compare_tables
from embkern.methods import METHODS as LISTED
from embkern.methods.base import table_checksum
from embkern.methods.nonlinear import nonlinear_autoencoder
from embkern.methods.product import product_quantization
from embkern.methods.scalar import lloyd_max, rtn
from embkern.methods.storage import direction_error
from tests.methods.row_tables import FAST, METHODS, USED, dense, embeddings, run


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_budget_is_used_and_never_exceeded(method, dtype):
    table = embeddings(2000, dtype=dtype)
    for ratio in (2, 3.7, 5):
        got = run(method, table, ratio)
        assert got.nbytes == sum(each.nbytes for each in got.tensors().values()) <= table.nbytes / ratio
        # The codes of these methods have at most 8 bits per value.
        most = table.numel() if method in (rtn, lloyd_max, product_quantization) else math.inf
        assert got.nbytes >= USED.get(method, 0.95) * min(table.nbytes / ratio, most)
        assert dense(got).shape == table.shape == (got.num_embeddings, got.embedding_dim)
        assert dense(got).dtype == torch.float32
        assert torch.isfinite(dense(got)).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_smaller_ratio_has_less_error_and_any_beats_the_mean_row(method):
    table = embeddings()
    errors = [direction_error(table, dense(run(method, table, ratio))) for ratio in (2.5, 4, 8)]
    assert errors == sorted(errors)
    assert errors[-1] < direction_error(table, table.mean(0).expand_as(table))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_table_gives_the_same_bits_and_generators_are_left_alone(method):
    table = embeddings(300)
    state = torch.get_rng_state()
    first, second = run(method, table, 3), run(method, table.clone(), 3)
    assert table_checksum(dense(first)) == table_checksum(dense(second))
    assert (first.settings(), first.facts) == (second.settings(), second.facts)
    assert all(torch.equal(each, second.tensors()[name]) for name, each in first.tensors().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("V", "H"), [(1, 33), (7, 5), (7, 1), (600, 1)], ids=str)
def test_small_tables_work_or_name_the_highest_ratio(method, V, H):
    table = embeddings(V, H)
    try:
        got = run(method, table, 1.5)
    except ValueError as refused:
        highest, comma, impossible = str(refused).rsplit("the highest that fits is ", 1)[1].partition(", ")
        if comma:
            assert impossible == "so it cannot be made smaller by this method"
            assert float(highest) < 1
            return
        assert 1 <= float(highest) < 1.5
        got = run(method, table, float(highest))
    assert dense(got).shape == (V, H)
    assert got.nbytes <= table.nbytes


@pytest.mark.parametrize("method", METHODS)
def test_the_highest_ratio_that_is_named_is_the_highest(method):
    table = embeddings(500)
    with pytest.raises(
        ValueError, match="ratio: 1e.06 leaves no room .* the highest that fits is"
    ) as refused:
        run(method, table, 1e6)
    highest = float(str(refused.value).rsplit(" ", 1)[-1])
    assert run(method, table, highest).nbytes <= table.nbytes / highest
    with pytest.raises(ValueError, match="leaves no room"):
        run(method, table, highest + 0.002)


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_zeros_and_equal_rows(method):
    table = embeddings(300)
    table[7] = 0
    assert torch.isfinite(dense(run(method, table, 3))).all()
    equal = torch.linspace(-1, 1, 32).expand(300, 32)
    assert direction_error(equal, dense(run(method, equal, 2))) < 2e-3
    # The non-linear autoencoder normalises its output, which is not zero for a table of zeros.
    if method is not nonlinear_autoencoder:
        assert not dense(run(method, torch.zeros(300, 8), 2)).any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("table", "arguments", "error", "message"),
    [
        (torch.zeros(5), {"ratio": 2}, ValueError, r"table: expected shape \(V, H\)"),
        (torch.zeros(5, 4).int(), {"ratio": 2}, TypeError, "table: expected a floating-point dtype"),
        (torch.full((2, 1), float("nan")), {"ratio": 2}, ValueError, "in 2 row.s.: 0, 1"),
        (torch.zeros(5, 4), {"ratio": 0.5}, ValueError, "ratio: expected at least 1 .* got 0.5"),
        (torch.zeros(5, 4), {"ratio": float("nan")}, ValueError, "ratio: expected at least 1 .* got nan"),
        (torch.zeros(5, 4), {"ratio": 2, "rank": 3}, ValueError, "rank: Extra inputs .*known: "),
    ],
)
def test_bad_arguments_are_named(method, table, arguments, error, message):
    with pytest.raises(error, match=message):
        method(table, **arguments)


@pytest.mark.parametrize(
    "method",
    [each for each in METHODS if each.id.startswith(("product", "nonlinear", "prune"))],
)
def test_counts_lower_the_error_of_frequent_rows(method):
    table = embeddings(400, 32)
    table[:200, :16] *= 0.01  # the halves of the table need different columns
    table[200:, 16:] *= 0.01
    counts = torch.ones(400, dtype=torch.float64)
    counts[200:] = 1e4
    # After the 8 epochs of FAST the initial weights dominate; after 20 the counts do, in each of 12 draws.
    longer = {"epochs": 20} if method is nonlinear_autoencoder else {}
    plain, weighted = (dense(run(method, table, 8, counts=each, **longer)) for each in (None, counts))
    assert direction_error(table[200:], weighted[200:]) < direction_error(table[200:], plain[200:])
    for bad, message in (
        (counts[1:], r"counts: expected shape \(400,\), .*got \(399,\)"),
        (-counts, "counts: expected finite values of at least 0, got -1"),
        (0 * counts, "counts: expected one above 0, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            run(method, table, 8, counts=bad)


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_runs_it_and_a_comparison_takes_its_result(method):
    table, counts = embeddings(300), torch.arange(1, 301).double()
    listed = LISTED[method.__name__]
    assert (listed.compress, listed.sized_by) == (method, "ratio")
    recipe = Recipe.parse(method=method.__name__, ratio=3, options=FAST.get(method, {}))
    got = recipe.factorize(table, counts)
    expected = run(method, table, 3, counts=counts)  # methods that are not weighted ignore the counts
    assert torch.equal(dense(got), dense(expected))
    error = direction_error(table, dense(got))
    assert compare_tables(table, got.to(table.dtype)).direction_error == pytest.approx(error)


def test_a_table_beyond_fp16_is_refused():
    with pytest.raises(ValueError, match="table: expected values that torch.float16 can hold, got "):
        rtn(torch.randn(300, 8) * 1e8, ratio=2)

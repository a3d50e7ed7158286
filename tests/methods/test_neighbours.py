"""The methods that embkern is compared with: their bytes, their exact cases, what they refuse."""

from __future__ import annotations

import importlib.util
import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from embkern import Recipe
from embkern.fidelity import compare_tables
from embkern.methods import METHODS
from embkern.methods.base import table_checksum
from embkern.methods.quantizer_levels import lloyd_max_levels
from embkern.rivals.nonlinear import nonlinear_autoencoder
from embkern.rivals.product import product_quantization
from embkern.rivals.pruning import vocabulary_pruning
from embkern.rivals.reconstruction import Reconstruction, direction_error
from embkern.rivals.rtn import lloyd_max, rtn
from embkern.rivals.tensor_train import tensor_train

needs_faiss = pytest.mark.skipif(not importlib.util.find_spec("faiss"), reason="faiss is not installed")

FAST = {
    nonlinear_autoencoder: {"epochs": 8, "batch_size": 32, "lr": 3e-3},
    product_quantization: {"iterations": 3},
}
NEIGHBOURS = [
    pytest.param(method, marks=needs_faiss if method is product_quantization else (), id=method.__name__)
    for method in (
        rtn,
        lloyd_max,
        product_quantization,
        nonlinear_autoencoder,
        tensor_train,
        vocabulary_pruning,
    )
]
# Of the budget, at least: bits and ranks are whole. Where b bits a value fit and one more does not quite,
# b / (b + 1) of it are used; the largest ratio below leaves 3.2 bits of fp16.
USED = {rtn: 0.7, lloyd_max: 0.7, product_quantization: 0.7, nonlinear_autoencoder: 0.9}


def run(method, table, ratio, **options):
    return method(table, ratio=ratio, **{**FAST.get(method, {}), **options})


def embeddings(V=1000, H=33, dtype=torch.float32):
    """Rows in clusters, of different lengths, with a spectrum."""
    rows = torch.randn(40, H)[torch.arange(V) % 40] + 0.7 * torch.randn(V, H)
    return (rows * torch.logspace(0, -1, H) * (0.5 + torch.rand(V, 1))).to(dtype)


@pytest.mark.parametrize("method", NEIGHBOURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_budget_is_used_and_never_exceeded(method, dtype):
    table = embeddings(2000, dtype=dtype)
    for ratio in (2, 3.7, 5):
        got = run(method, table, ratio)
        assert got.nbytes == sum(got.parts.values()) <= table.nbytes / ratio
        most = table.numel() if method in (rtn, lloyd_max, product_quantization) else math.inf  # 8 bits each
        assert got.nbytes >= USED.get(method, 0.95) * min(table.nbytes / ratio, most)
        assert got.to_dense().shape == table.shape == (got.num_embeddings, got.embedding_dim)
        assert got.to_dense().dtype == torch.float32
        assert torch.isfinite(got.to_dense()).all()


@pytest.mark.parametrize("method", NEIGHBOURS)
def test_a_smaller_ratio_is_closer_and_beats_one_row_for_all(method):
    table = embeddings()
    errors = [direction_error(table, run(method, table, ratio).to_dense()) for ratio in (2.5, 4, 8)]
    assert errors == sorted(errors)
    assert errors[-1] < direction_error(table, table.mean(0).expand_as(table))


@pytest.mark.parametrize("method", NEIGHBOURS)
def test_the_same_table_gives_the_same_bits_and_generators_are_left_alone(method):
    table = embeddings(300)
    state = torch.get_rng_state()
    first, second = run(method, table, 3), run(method, table.clone(), 3)
    assert table_checksum(first.to_dense()) == table_checksum(second.to_dense())
    assert (first.parts, first.facts) == (second.parts, second.facts)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", NEIGHBOURS)
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
    assert got.to_dense().shape == (V, H)
    assert got.nbytes <= table.nbytes


@pytest.mark.parametrize("method", NEIGHBOURS)
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


@pytest.mark.parametrize("method", NEIGHBOURS)
def test_rows_of_zeros_and_equal_rows(method):
    table = embeddings(300)
    table[7] = 0
    assert torch.isfinite(run(method, table, 3).to_dense()).all()
    equal = torch.linspace(-1, 1, 32).expand(300, 32)
    assert direction_error(equal, run(method, equal, 2).to_dense()) < 2e-3
    if method is not nonlinear_autoencoder:  # it divides by the norm of what it has learnt of nothing
        assert not run(method, torch.zeros(300, 8), 2).to_dense().any()


@pytest.mark.parametrize("method", NEIGHBOURS)
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
    [each for each in NEIGHBOURS if each.id.startswith(("product", "nonlinear", "vocabulary"))],
)
def test_counts_shift_the_error_to_rows_that_are_not_read(method):
    table = embeddings(400, 32)
    table[:200, :16] *= 0.01  # what one half needs is of no use to the other
    table[200:, 16:] *= 0.01
    counts = torch.ones(400, dtype=torch.float64)
    counts[200:] = 1e4
    # After the 8 epochs of FAST the initial weights decide; after 20 the counts do, in each of 12 draws.
    longer = {"epochs": 20} if method is nonlinear_autoencoder else {}
    plain, weighted = (run(method, table, 8, counts=each, **longer).to_dense() for each in (None, counts))
    assert direction_error(table[200:], weighted[200:]) < direction_error(table[200:], plain[200:])
    for bad, message in (
        (counts[1:], r"counts: expected shape \(400,\), .*got \(399,\)"),
        (-counts, "counts: expected finite values of at least 0, got -1"),
        (0 * counts, "counts: expected one above 0, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            run(method, table, 8, counts=bad)


@pytest.mark.parametrize("method", NEIGHBOURS)
def test_a_recipe_runs_it_and_a_comparison_takes_its_result(method):
    table, counts = embeddings(300), torch.arange(1, 301).double()
    listed = METHODS[method.__name__]
    assert (listed.compress, listed.sized_by, listed.installable) == (method, "ratio", False)
    recipe = Recipe.parse(method=method.__name__, ratio=3, options=FAST.get(method, {}))
    got = recipe.factorize(table, counts)
    expected = run(method, table, 3, counts=counts)  # those that are not weighted ignore them
    assert torch.equal(got.to_dense(), expected.to_dense())
    error = direction_error(table, got.to_dense())
    assert compare_tables(table, got).direction_error == pytest.approx(error)


# Scalar quantisers


@pytest.mark.parametrize("group", [None, 8, 10])
def test_round_to_nearest_is_within_half_a_step(group):
    table = embeddings()
    got = rtn(table, ratio=1.2, bits=8, group=group)
    assert got.facts["bits"] == 8
    for x, y in zip(
        table.split(got.facts["group"], 1), got.to_dense().split(got.facts["group"], 1), strict=True
    ):
        low, high = x.aminmax(dim=1, keepdim=True)
        step = (high - low) / 255
        rounding = 2**-11 * (low.abs() + high - low)  # of minimum and scale to fp16
        assert ((x - y).abs() <= (0.5 + 1e-3) * step + rounding).all()


def test_the_bytes_of_quantised_rows():
    table = embeddings(101, 33)
    got = rtn(table, ratio=2, bits=3, group=10)  # four groups, of 10, 10, 10 and 3
    assert got.parts == {
        "codes": math.ceil(101 * 33 * 3 / 8),
        "scales": 101 * 4 * 2,
        "minima": 101 * 4 * 2,
    }
    assert lloyd_max(table, ratio=2, bits=3, group=10).parts == {
        "codes": math.ceil(101 * 33 * 3 / 8),
        "scales": 101 * 4 * 2,
    }


def test_a_table_on_the_grid_is_exact():
    codes = torch.randint(0, 16, (50, 64)).float()
    codes[:, 0], codes[:, 1] = 0, 15
    assert torch.equal(rtn(codes / 8 - 1, ratio=4, bits=4).to_dense(), codes / 8 - 1)
    signs = torch.randn(50, 64).sign() * 2.0 ** torch.randint(-4, 4, (50, 1))
    assert_close(lloyd_max(signs, ratio=20).to_dense(), signs, rtol=2**-11, atol=0)


def test_lloyd_max_with_a_searched_scale_beats_round_to_nearest_and_the_plain_scale():
    table = torch.randn(500, 64)
    for bits in (2, 3, 4):
        searched = lloyd_max(table, ratio=4, bits=bits, group=64).to_dense()
        levels = lloyd_max_levels(bits).float()
        spread = table.square().mean(1, keepdim=True).sqrt()
        plain = levels[torch.bucketize(table / spread, (levels[1:] + levels[:-1]) / 2)] * spread
        assert direction_error(table, searched) < direction_error(table, plain)
        assert direction_error(table, searched) < direction_error(
            table, rtn(table, ratio=4, bits=bits, group=64).to_dense()
        )


def test_bits_and_group_are_the_best_that_fit():
    table = embeddings(800, 96)
    table[:, ::32] *= 20  # a group's scale is worth its bytes here
    for method in (rtn, lloyd_max):
        best = direction_error(table, method(table, ratio=6).to_dense())
        for bits, group in itertools.product((2, 3, 4), (32, 64, 96)):
            try:
                other = method(table, ratio=6, bits=bits, group=group)
            except ValueError:
                continue
            assert best <= direction_error(table, other.to_dense()) * 1.001


def test_a_table_beyond_fp16_is_refused():
    with pytest.raises(ValueError, match="table: expected values that fp16 can hold, got "):
        rtn(torch.randn(300, 8) * 1e8, ratio=2)


# Product quantisation


@needs_faiss
def test_a_table_of_few_words_is_exact():
    words = torch.randn(4, 16, 8).half().float()  # of four subspaces, 16 each
    table = torch.cat([book[torch.randint(16, (900,))] for book in words], dim=1)
    got = product_quantization(table, ratio=8, bits=4, scales=False, rotation="none", iterations=50)
    assert got.facts["subspaces"] >= 4
    assert direction_error(table, got.to_dense()) < 0.02  # k-means finds most of them
    assert got.parts == {
        "codes": math.ceil(900 * got.facts["subspaces"] * 4 / 8),
        "books": 16 * 32 * 2,
    }


@needs_faiss
def test_subspaces_of_uneven_width_cover_every_column():
    table = embeddings(2000, 7)
    got = product_quantization(table, ratio=4.5, bits=8, scales=False)
    assert 1 < got.facts["subspaces"] < 7
    assert torch.isfinite(got.to_dense()).all()
    assert (got.to_dense().abs().sum(0) > 0).all()


@needs_faiss
def test_scales_are_chosen_where_rows_differ_in_length():
    table = embeddings(2000, 32)
    assert product_quantization(table * torch.logspace(0, 2, 2000).unsqueeze(1), ratio=8).facts["scales"]
    errors = {
        scales: direction_error(table, product_quantization(table, ratio=8, scales=scales).to_dense())
        for scales in (True, False, None)
    }
    assert errors[None] <= 1.01 * min(errors[True], errors[False])


@needs_faiss
def test_a_rotation_pays_where_columns_are_correlated():
    table = torch.randn(4000, 16) * torch.logspace(0, -1.5, 16) @ torch.linalg.qr(torch.randn(16, 16))[0]
    plain, pca, opq = (
        product_quantization(table, ratio=8, bits=6, scales=False, rotation=rotation)
        for rotation in ("none", "pca", "opq")
    )
    assert pca.parts["rotation"] == opq.parts["rotation"] == 16 * 16 * 2
    errors = [direction_error(table, each.to_dense()) for each in (plain, pca, opq)]
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < errors[1]


def test_without_faiss_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        product_quantization(embeddings(), ratio=4)


# The non-linear autoencoder


def test_it_learns_a_surface_that_no_plane_holds():
    angle = torch.rand(3000, 1) * 2 * math.pi
    frequencies = torch.arange(1, 5)
    table = torch.cat(
        [(angle * frequencies).cos(), (angle * frequencies).sin()], 1
    )  # a curve in 8 dimensions
    got = nonlinear_autoencoder(table, ratio=2, epochs=20, batch_size=64, lr=2e-3)
    r = got.facts["r"]
    left, values, right = torch.linalg.svd(table, full_matrices=False)
    linear = (left[:, :r] * values[:r]) @ right[:r]
    assert direction_error(table, got.to_dense()) < 0.7 * direction_error(table, linear)


def test_r_is_the_largest_and_norms_are_kept():
    table = embeddings(400, 16)
    got = nonlinear_autoencoder(table, ratio=2, epochs=1, batch_size=64)
    r = got.facts["r"]

    def values(r):
        return 400 * r + 400 + (r + 1) * 2 * r + (2 * r + 1) * 4 * r + (4 * r + 1) * 16

    assert got.nbytes == 4 * values(r) <= table.nbytes / 2 < 4 * values(r + 1)
    assert_close(got.to_dense().norm(dim=1), table.norm(dim=1))
    halves = nonlinear_autoencoder(table, ratio=2, epochs=1, batch_size=64, storage="float16")
    assert halves.facts["r"] > r
    assert halves.nbytes == 2 * values(halves.facts["r"])


def test_the_best_epoch_is_kept():
    table = embeddings(200, 8)
    got = nonlinear_autoencoder(table, ratio=2, epochs=9, batch_size=16, lr=0.15)
    errors = got.facts["direction_errors"]
    assert len(errors) == 9
    assert min(errors) < 0.99 * errors[-1]  # else this shows nothing
    assert direction_error(table, got.to_dense()) == pytest.approx(min(errors), rel=1e-4)
    with torch.no_grad():
        assert nonlinear_autoencoder(table, ratio=2, epochs=1).facts["r"] == got.facts["r"]


# Tensor trains


@pytest.mark.parametrize("cores", [2, 3])
def test_a_table_of_rank_one_is_exact(cores):
    V, H = (4, 6), (3, 2)  # 24 rows and 6 columns, as they are split
    if cores == 3:
        V, H = (2, 3, 4), (3, 2, 1)
    table = torch.ones(1, 1)
    for v, h in zip(V, H, strict=True):
        table = torch.kron(table, torch.randn(v, h))
    got = tensor_train(table, ratio=2, cores=cores)
    assert_close(got.to_dense(), table, rtol=2**-10, atol=1e-6)  # scales are fp16
    got = tensor_train(table, ratio=4, cores=cores, scales=False)
    assert (tuple(got.facts["rows"]), tuple(got.facts["columns"])) == (V, H)
    assert_close(got.to_dense(), table, rtol=1e-5, atol=1e-6)


def test_full_ranks_are_exact_and_two_cores_are_an_svd():
    table = torch.randn(16, 9).double()
    got = tensor_train(table, ratio=1, cores=2, scales=False)
    assert got.facts["rows"] == [4, 4]
    assert got.facts["columns"] == [3, 3]
    matrix = table.view(4, 4, 3, 3).permute(0, 2, 1, 3).reshape(12, 12)
    rank = got.facts["ranks"][0]
    left, values, right = torch.linalg.svd(matrix)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    assert float((got.to_dense() - table).norm()) == pytest.approx(float((best - matrix).norm()), rel=1e-5)
    assert got.nbytes == 8 * rank * 24

    low = torch.kron(torch.randn(2, 3), torch.randn(3, 2)) + torch.kron(torch.randn(2, 3), torch.randn(3, 2))
    table = torch.kron(low, torch.randn(4, 1))  # ranks 2 and 1
    assert_close(tensor_train(table, ratio=1.5, scales=False).to_dense(), table, rtol=1e-5, atol=1e-5)


def test_rows_that_do_not_factorise_are_padded():
    got = tensor_train(torch.randn(30522 // 64 + 1, 13), ratio=2)
    assert math.prod(got.facts["rows"]) >= 477
    assert math.prod(got.facts["rows"]) <= 1.1 * 477
    assert sorted(got.facts["columns"]) == [1, 1, 13]
    assert got.to_dense().shape == (477, 13)


# Pruning


def test_kept_rows_are_exact_and_the_others_are_the_weighted_mean():
    table, counts = torch.randn(50, 8), torch.arange(50.0).double().flip(0)
    counts[10] = 1000
    got = vocabulary_pruning(table, ratio=4, counts=counts)
    kept = got.facts["kept"]
    assert got.parts == {"rows": kept * 32, "mean": 32, "bitmap": 7}
    assert got.nbytes + 32 > table.nbytes / 4
    assert kept == 11
    assert torch.equal(got.to_dense()[:11], table[:11])
    others = counts[11:, None] * table[11:].double()
    mean = (others.sum(0) / counts[11:].sum()).float()
    assert_close(got.to_dense()[11:], mean.expand(39, 8))


def test_all_rows_kept_are_exact():
    table = torch.randn(50, 8)
    got = vocabulary_pruning(table, ratio=1)
    assert torch.equal(got.to_dense(), table)
    assert got.parts == {"rows": table.nbytes}
    assert torch.equal(vocabulary_pruning(table, ratio=2, storage="float16").to_dense(), table.half().float())


def test_a_reconstruction_is_fp32():
    with pytest.raises(ValueError, match=r"rows: expected \(V, H\) float32, got \(3, 2\) torch.float64"):
        Reconstruction(torch.zeros(3, 2).double(), {})

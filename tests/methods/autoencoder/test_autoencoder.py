"""``autoencoder``: training, the choice of the best epoch, the log, and wrong arguments."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from embkern.methods import autoencoder, svd
from tests.methods.autoencoder.runs import QUICK, equal


@pytest.mark.parametrize("activation", [None, "elu"])
def test_training_lowers_the_direction_error(table, activation):
    def error(factors):
        return float((1 - F.cosine_similarity(table, factors.to_dense())).mean())

    short = autoencoder(table, 3, **QUICK | dict(epochs=1), activation=activation)
    long = autoencoder(table, 3, **QUICK | dict(epochs=40, lr_step=20, lr=5e-3), activation=activation)
    assert error(long) < 0.6 * error(short)
    assert long.activation == activation
    if activation is None:  # training approaches the best linear map
        assert error(long) < error(svd(table, 3)) + 0.05


def test_svd_initialisation_starts_at_the_svd(table):
    start = autoencoder(table, 3, **QUICK | dict(epochs=1), init="svd", lr=1e-12)
    assert_close(start.to_dense(), svd(table, 3).to_dense(), atol=1e-4, rtol=1e-4)


def test_the_same_seed_gives_the_same_bits_and_the_global_generator_is_left_alone(table):
    state = torch.get_rng_state()
    first, second = (autoencoder(table, 3, **QUICK) for _ in range(2))
    assert equal(first, second)
    assert not equal(first, autoencoder(table, 3, **QUICK, seed=2))
    assert torch.equal(torch.get_rng_state(), state)


def test_other_devices_are_not_reseeded(table, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("reseeded every GPU"))
    autoencoder(table, 3, **QUICK, init="svd")
    svd(table, 3, algorithm="randomized")


def test_the_callers_modes_do_not_matter(table):
    expected = autoencoder(table, 3, **QUICK)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert equal(autoencoder(table, 3, **QUICK), expected)
    with torch.device("meta"):
        assert equal(autoencoder(table, 3, **QUICK), expected)
    with torch.inference_mode():
        assert equal(autoencoder(table.clone(), 3, **QUICK), expected)


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_named(table, score):
    with pytest.raises(ValueError, match="validate: expected a finite score in epoch 0"):
        autoencoder(table, 3, **QUICK, validate=lambda factors: score)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_dtype_of_the_table_is_kept(table, dtype):
    factors = autoencoder(table.to(dtype), 3, **QUICK)
    assert {tensor.dtype for tensor in factors.tensors().values()} == {dtype}


def test_the_log_has_a_line_per_epoch(table, tmp_path):
    autoencoder(table, 3, **QUICK, log=tmp_path / "log.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert {"loss", "direction_error", "rmse", "alpha", "lr", "score", "seconds"} <= lines[0].keys()
    assert lines[2]["direction_error"] < lines[0]["direction_error"]


def test_the_best_epoch_by_the_callers_score_is_kept(table):
    seen = []

    def prefer_the_second(factors):
        seen.append(factors)
        return 0.0 if len(seen) == 2 else 1.0

    assert equal(autoencoder(table, 3, **QUICK, validate=prefer_the_second), seen[1])
    assert len(seen) == 3


def test_the_facts_are_those_of_the_best_epoch(table, tmp_path):
    scores = iter([2.0, 1.0, 3.0])
    log, run = tmp_path / "log", dict(**QUICK, checkpoint=tmp_path / "c")
    done = autoencoder(table, 3, **run, log=log, validate=lambda factors: next(scores))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert done.facts == {name: lines[1][name] for name in ("epoch", "loss", "direction_error", "rmse")}
    log.unlink()
    assert autoencoder(table, 3, **run, log=log).facts == done.facts
    assert [json.loads(line) for line in log.read_text().splitlines()] == lines, "a finished run has a log"


def test_divergence_is_an_error(table):
    with pytest.raises(RuntimeError, match="training diverged, lower lr"):
        autoencoder(table, 3, **QUICK | dict(epochs=20), lr=1e30, mse_weight=1.0)


@pytest.mark.parametrize("shape", [(1, 5), (3, 1), (33, 7)], ids=str)
def test_odd_tables(shape):
    assert autoencoder(torch.randn(shape), 1, **QUICK).to_dense().shape == shape


def test_zero_rows_and_equal_rows():
    table = torch.randn(20, 6)
    table[3:9] = 0
    table[10:15] = 1
    assert torch.isfinite(autoencoder(table, 2, **QUICK, rmse_weight=1.0).to_dense()).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(epochs=0), "autoencoder: epochs: .* greater than or equal to 1, got 0"),
        (dict(lr=-1.0), "lr: .* greater than 0"),
        (dict(batch_size=0), "batch_size"),
        (dict(activation="relu"), "activation: .*got 'relu'"),
        (dict(init="pca"), "init"),
        (dict(epoch=3), "epoch: Extra inputs"),
    ],
)
def test_bad_options_are_named(table, options, message):
    with pytest.raises(ValueError, match=message):
        autoencoder(table, 3, progress=False, **options)


def test_bad_tables_and_ranks_are_named(table):
    with pytest.raises(ValueError, match="rank: expected 1 <= rank <= H = 10, got 11"):
        autoencoder(table, 11)
    table[4] = float("inf")
    with pytest.raises(ValueError, match=r"table: expected finite values, got .* in 1 row\(s\): 4"):
        autoencoder(table, 3)

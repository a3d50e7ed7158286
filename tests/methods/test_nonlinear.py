"""``nonlinear_autoencoder``: its size, its best epoch, and a table that linear methods cannot fit."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from embkern.methods import nonlinear
from embkern.methods.nonlinear import nonlinear_autoencoder
from embkern.methods.storage import direction_error
from embkern.tables.nonlinear import NonlinearTable
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


def test_the_best_epoch_is_kept(monkeypatch):
    """Which epoch is the best is a matter of chance: here it is the second of four, as the measure has it."""
    table, measured, scripted, kept = (
        embeddings(200, 8),
        nonlinear.direction_error_of,
        [0.5, 0.3, 0.4, 0.6],
        [],
    )
    for epochs in (2, 4):
        errors = iter(scripted)
        monkeypatch.setattr(nonlinear, "direction_error_of", lambda *_, errors=errors: next(errors))
        kept.append(nonlinear_autoencoder(table, ratio=2, epochs=epochs, batch_size=16))
        assert kept[-1].facts["direction_errors"] == scripted[:epochs]
    assert torch.equal(*map(dense, kept))
    monkeypatch.setattr(nonlinear, "direction_error_of", measured)
    errors = nonlinear_autoencoder(table, ratio=2, epochs=3, batch_size=16).facts["direction_errors"]
    best = nonlinear_autoencoder(table, ratio=2, epochs=1 + errors.index(min(errors)), batch_size=16)
    assert direction_error(table, dense(best)) == pytest.approx(min(errors), rel=1e-4)


def test_lengths_are_those_of_the_rows_those_of_the_least_error_or_none():
    table = embeddings(400, 16)
    made = {
        norms: nonlinear_autoencoder(table, ratio=2, epochs=3, batch_size=64, norms=norms)
        for norms in ("original", "fitted", "none")
    }
    original, fitted = dense(made["original"]), dense(made["fitted"])
    length = table.norm(dim=1)
    assert_close(original.norm(dim=1), length)
    # The same direction, up to a sign, in the length of the projection.
    cosine = torch.nn.functional.cosine_similarity(table, original)
    assert_close(fitted, original * cosine.unsqueeze(1), rtol=1e-4, atol=1e-5)
    assert (table - fitted).square().sum() < (table - original).square().sum()
    without = made["none"]
    assert without.norms is None
    assert without.facts["r"] >= made["original"].facts["r"]
    assert without.nbytes <= table.nbytes / 2
    assert float(dense(without).abs().max()) <= 1
    again = without.take(torch.tensor([3, 3]))
    assert_close(dense(again), dense(without)[[3, 3]])


def test_a_table_without_lengths_is_saved_and_read(tmp_path):
    got = nonlinear_autoencoder(embeddings(200, 8), ratio=2, epochs=1, norms="none")
    got.save(tmp_path / "table.safetensors")
    again = NonlinearTable.load(tmp_path / "table.safetensors")
    assert again.norms is None
    assert torch.equal(dense(again), dense(got))


def test_given_weights_weigh_the_rows():
    table, weight = embeddings(300, 8), torch.rand(300) + 0.01
    fits = {"ratio": 3, "epochs": 3, "batch_size": 64}
    got = nonlinear_autoencoder(table, **fits, row_weight=weight)
    missed = 1 - torch.nn.functional.cosine_similarity(table, dense(got))
    weighted = float((weight * missed).sum() / weight.sum())
    assert min(got.facts["direction_errors"]) == pytest.approx(weighted, rel=1e-4)
    same = nonlinear_autoencoder(table, **fits, counts=weight, exponent=1.0)
    assert torch.equal(dense(got), dense(same))
    assert not torch.equal(dense(got), dense(nonlinear_autoencoder(table, **fits)))
    with pytest.raises(ValueError, match="counts, row_weight: expected at most one of them, got both"):
        nonlinear_autoencoder(table, ratio=3, counts=weight, row_weight=weight)
    with pytest.raises(ValueError, match="weights: expected with 'fisher' .*, got none"):
        nonlinear_autoencoder(table, ratio=3, weights="fisher")
    with pytest.raises(ValueError, match=r"row_weight: expected shape \(300,\)"):
        nonlinear_autoencoder(table, ratio=3, row_weight=weight[1:])

"""Recipes: from Python and from YAML, with errors that name the field."""

from __future__ import annotations

import pytest
import torch

from embkern import Recipe
from embkern.methods import METHODS
from embkern.recipe import DEFAULT_METHOD
from embkern.tables.packed import PackedTable
from tests.example_tables import quantizing  # noqa: F401 (a fixture)


def test_defaults():
    recipe = Recipe.parse(ratio=5)
    assert (recipe.method, recipe.lm_head, recipe.options) == (DEFAULT_METHOD, "factorized", {})
    assert DEFAULT_METHOD in METHODS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "expected exactly one of ratio and rank"),
        (dict(ratio=5, rank=3), "expected exactly one of ratio and rank"),
        (dict(ratio=0.5), "ratio: expected at least 1 .* got 0.5"),
        (dict(ratio=float("nan")), "ratio: expected at least 1"),
        (dict(ratio="five"), "ratio: .*valid number.* got 'five'"),
        (dict(rank=0), "rank: expected at least 1, got 0"),
        (dict(rank=-3), "rank: expected at least 1, got -3"),
        (dict(rank=2.5), "rank: .*integer"),
        (dict(rank=True), "rank: .*integer"),
        (dict(ratio=5, method="pq"), "method: .*expected one of .*autoencoder, .*svd.*, got 'pq'"),
        (dict(ratio=5, lm_head="tied"), "lm_head: .*got 'tied'"),
        (dict(ratio=5, epochs=3), "epochs: Extra inputs"),
        (
            dict(ratio=5, method="autoencoder", options=dict(epoch=3)),
            "autoencoder: epoch: Extra inputs .*known: activation",
        ),
        (dict(ratio=5, method="svd", options=dict(epochs=3)), "svd: epochs: Extra inputs"),
        (dict(ratio=5, method="autoencoder", options=dict(epochs=-1)), "autoencoder: epochs: .* got -1"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe.parse(**fields)


def test_yaml_and_overrides(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("method: autoencoder\nratio: 5\noptions:\n  epochs: 7\n  lr: 0.01\n")
    assert Recipe.from_yaml(path).options == {"epochs": 7, "lr": 0.01}
    assert Recipe.from_yaml(path, {"method": "svd", "lm_head": "dense"}).lm_head == "dense"
    assert Recipe.from_yaml(path, {"method": "svd"}).method == "autoencoder"
    recipe = Recipe.from_yaml(path, rank=4, options={"epochs": 2})
    assert (recipe.ratio, recipe.rank, recipe.options) == (None, 4, {"epochs": 2, "lr": 0.01})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1\n", "recipe: expected a mapping of field names in .*, got .1."),
        ("", "expected a mapping of field names in .*, got None"),
        ("a: [1\n", "recipe: .* is not readable YAML"),
        ("ratio: 5\nspeed: 3\n", "recipe: speed: Extra inputs"),
        ("ratio: 5\noptions: 3\n", "recipe: options: expected a mapping in .*, got 3"),
        ("ratio: 5\n1: 2\n", "expected a mapping of field names"),
        ("[" * 10_000 + "]" * 10_000, "recipe: .* is not readable YAML"),
        ("ratio: " + "1" * 5_000, "recipe: .* is not readable YAML"),
    ],
)
def test_bad_yaml_is_named(tmp_path, content, message):
    path = tmp_path / "r.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Recipe.from_yaml(path)


def test_the_ratio_counts_every_byte():
    table = torch.randn(400, 24)
    for method, options in (("svd", {}), ("svd", {"center": True}), ("autoencoder", {"epochs": 1})):
        factors = Recipe.parse(method=method, ratio=4, options=options).factorize(table)
        assert table.nbytes / factors.nbytes >= 4
        assert (factors.offset is not None) == (method == "autoencoder" or bool(options))


def test_a_rank_above_the_width_is_refused():
    with pytest.raises(ValueError, match="rank: expected 1 <= rank <= H = 24, got 25"):
        Recipe.parse(method="svd", rank=25).factorize(torch.randn(400, 24))


@pytest.mark.usefixtures("quantizing")
def test_a_method_whose_size_is_a_number_of_bytes_has_no_rank():
    table = torch.randn(90, 24)
    with pytest.raises(ValueError, match="rank: expected a ratio with method 'quantize', got 3; .* svd"):
        Recipe.parse(method="quantize", rank=3)
    recipe = Recipe.parse(method="quantize", ratio=2)
    with pytest.raises(ValueError, match="rank: tables of method 'quantize' have no rank"):
        recipe.rank_for(90, 24)
    assert isinstance(recipe.factorize(table), PackedTable)


def test_counts_reach_only_methods_that_weight_rows(monkeypatch):
    given = {}
    for name in ("quantize", "light"):
        method = METHODS["svd"]._replace(
            compress=lambda table, rank, **kwargs: given.update({rank: kwargs}), weighted=name == "quantize"
        )
        monkeypatch.setitem(METHODS, name, method)
    counts = torch.ones(90).double()
    Recipe.parse(method="quantize", rank=1).factorize(torch.randn(90, 24), counts)
    Recipe.parse(method="light", rank=2).factorize(torch.randn(90, 24), counts)
    assert given == {1: {"counts": counts}, 2: {}}


def test_a_deeply_nested_recipe_is_refused(tmp_path):
    (tmp_path / "r").write_text("a: " + "[" * 3000)
    with pytest.raises(ValueError, match="recipe: .* is not readable YAML"):
        Recipe.from_yaml(tmp_path / "r")

"""The benchmark of the direction solver."""

import json

import pytest
import torch

from benchmarks import direction
from benchmarks.training_loops import TABLES

pytestmark = pytest.mark.slow


def test_the_direction_benchmark_says_gap_and_times(tmp_path, monkeypatch):
    monkeypatch.setattr(direction, "PLAIN_STEPS", 10)
    given = ["--tables", "tiny", "--ratios", "5", "--epochs", "1", "--repeats", "2"]
    direction.main([*given, "--results", str(tmp_path)])
    rows = json.loads((tmp_path / "direction_cpu.json").read_text())["rows"]
    of = {row["method"]: row for row in rows}
    table = TABLES["tiny"]
    assert {(row["V"], row["H"], row["rank"]) for row in rows} == {
        (table.V, table.H, int(table.V * table.H / (5 * (table.V + table.H))))
    }
    assert 0 <= of["direction"]["relative_gap"] < 1e-2, "directions of random rows are almost tied"
    assert of["direction"]["direction_error"] <= of["svd"]["direction_error"]
    assert of["direction, center"]["direction_error"] <= of["pca"]["direction_error"]
    assert of["recipe, plain torch"]["extrapolated_from_steps"] == 10
    assert all(row["recipe_over_this"] > 0 for row in rows)
    assert torch.isfinite(torch.tensor([row["seconds"] for row in rows])).all()

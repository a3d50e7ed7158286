"""The benchmark of training: its plan, the fields it writes, and its failures."""

import importlib.util
import itertools
import json

import pytest

from benchmarks import plots, train, training_loops
from benchmarks.losses import TERMS
from benchmarks.training_loops import TABLES

pytestmark = pytest.mark.slow


TINY_TABLE = TABLES["tiny"]


def test_a_run_of_the_training_writes_every_field(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "gemm_peak", lambda dtype, device: 100.0)
    monkeypatch.setattr(train, "SLICE_SECONDS", 0.005)
    selection = "--device cpu --tables tiny --batches 32 full --terms cosine+power --threads 1"
    providers = "--providers plain embkern --cell-seconds 0 --full --epochs 1 --results"
    train.main([*selection.split(), *providers.split(), str(tmp_path)])
    contents = json.loads((tmp_path / "train_cpu.json").read_text())
    assert contents["failures"] == []
    assert contents["gemm_gflops"] == {"1": 100.0}
    V, H, r = TINY_TABLE.V, TINY_TABLE.H, TINY_TABLE.r
    steps = [row for row in contents["rows"] if row["op"] == "train"]
    assert {(row["batch"], row["provider"]) for row in steps} == {
        (batch, name) for batch in (32, V) for name in ("plain", "embkern")
    }
    for row in steps:
        batch = row["batch"]
        assert row["steps_per_second"] == pytest.approx(1e6 / row["p50"], rel=1e-2)
        assert row["rows_per_second"] == pytest.approx(1e6 * batch / row["p50"], rel=1e-2)
        floor = 5 * 2 * batch * H * r / 100e3  # us at 100 GFLOP/s
        assert row["share"] == pytest.approx(floor / row["p50"], rel=1e-2, abs=1e-4)
        assert row["baseline"] == "plain@1"
        assert row["slice_steps"] >= 1
        assert batch == V or row["peak_bytes"] is None
    peaks = {row["provider"]: row["peak_bytes"] for row in steps if row["batch"] == V}
    if peaks["plain"] is not None:
        assert peaks["plain"] > 2 * V * H * 4, "the reconstruction and its gradient at least"
    whole = {row["provider"]: row for row in contents["rows"] if row["op"] == "train_whole"}
    assert whole["plain"]["steps"] == whole["embkern"]["steps"] == -(-V // 32)
    errors = [whole[name]["direction_error"] for name in ("plain", "embkern")]
    assert errors[0] == pytest.approx(errors[1], rel=0.02), "other orders of rows, the same quality"
    if importlib.util.find_spec("matplotlib"):
        plots.main(["--results", str(tmp_path)])
        assert (tmp_path / "train_cpu.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "the whole recipe" in printed
    assert "the fastest plain loop" in printed


def test_a_loop_that_fails_fails_the_run_but_not_the_others(tmp_path, monkeypatch):
    class Broken(training_loops.PlainLoop):
        def run(self, order, alpha, lr):
            return super().run(order, alpha, lr) * 2

    monkeypatch.setitem(training_loops.PROVIDERS, "embkern-loss", training_loops.Provider(Broken))
    monkeypatch.setattr(train, "gemm_peak", lambda dtype, device: 100.0)
    monkeypatch.setattr(train, "SLICE_SECONDS", 0.005)
    selection = "--device cpu --tables tiny --batches 8 --terms cosine+mse --threads 1 --cell-seconds 0"
    with pytest.raises(SystemExit, match="1"):
        train.main([*selection.split(), "--providers", "plain", "embkern-loss", "--results", str(tmp_path)])
    contents = json.loads((tmp_path / "train_cpu.json").read_text())
    assert [row["provider"] for row in contents["rows"]] == ["plain"]
    assert "losses: relative error" in contents["failures"][0]["error"]


def test_every_default_plan_names_known_tables_and_terms():
    for device, quick in itertools.product(("cpu", "cuda"), ([], ["--quick"])):
        cells = train.plan(train._parse(["--device", device, *quick]))
        assert {32, None} <= {cell.batch for cell in cells}
        assert all(cell.table in TABLES and cell.terms in TERMS for cell in cells)

"""The benchmark of the lookup: its plan, the fields it writes, and its failures."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import gather_project, plots
from benchmarks.peers import PROVIDERS, Lookup, Provider
from benchmarks.results_file import ROOT
from benchmarks.shapes import MODELS

pytestmark = pytest.mark.slow


TINY = MODELS["tiny"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One small run of the command line, in a process as a user starts it."""
    directory = tmp_path_factory.mktemp("results")
    command = [
        "-m",
        "benchmarks",
        "gather_project",
        "--device",
        "cpu",
        "--models",
        "tiny",
        "--counts",
        "1",
        "2048",
        "--ids",
        "zipf",
        "text",
        "--dtypes",
        "fp32",
        "--modes",
        "forward",
        "both",
        "--no-compile",
        "--cell-seconds",
        "0.05",
        "--threads",
        "1",
    ]
    run = subprocess.run(
        [sys.executable, *command, "--results", str(directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout, directory


def test_a_run_writes_every_field(results):
    printed, directory = results
    contents = json.loads((directory / "gather_project_cpu.json").read_text())
    assert {"torch", "commit", "cpu", "threads", "embkern"} <= contents["environment"].keys()
    assert contents["copy_gbps"] > 0
    assert contents["gemm_gflops"]["fp32"] > 0
    assert contents["failures"] == []
    assert "liger fp32" in contents["unavailable"]
    assert "text ids, tiny" in contents["unavailable"]
    rows = contents["rows"]
    assert {(row["mode"], row["N"]) for row in rows} == {
        (m, n) for m in ("forward", "both") for n in (1, 2048)
    }
    for row in rows:
        assert (row["V"], row["H"], row["r"], row["ids"]) == (TINY.V, TINY.H, TINY.ranks[0], "zipf")
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert row["gbps"] > 0
        assert row["share"] > 0
        assert row["rounds"] >= 5
        assert row["baseline"] in PROVIDERS[row["provider"]].baselines
        assert row["speedup"] > 0
        assert (row["gflops"] == 0) == PROVIDERS[row["provider"]].dense
    (two_step,) = (r for r in rows if (r["provider"], r["mode"], r["N"]) == ("two-step", "forward", 1))
    assert two_step["baseline"] == "two-step"
    assert two_step["speedup"] == 1
    assert "embkern against the faster of two-step" in printed


def test_least_bytes_and_flops_are_the_documented_formulas(results):
    _, directory = results
    rows = json.loads((directory / "gather_project_cpu.json").read_text())["rows"]
    V, H, r, N, s = TINY.V, TINY.H, TINY.ranks[0], 2048, 4
    for row in (row for row in rows if row["N"] == N and row["provider"] in ("dense", "quint8", "embkern")):
        U = row["distinct"]
        moved = {
            ("embkern", "forward"): 8 * N + (U * r + r * H + H + N * H) * s,
            ("embkern", "both"): 16 * N + (2 * U * r + 3 * r * H + 2 * H + 2 * N * H + V * r) * s,
            ("dense", "forward"): 8 * N + (U * H + N * H) * s,
            ("dense", "both"): 16 * N + (U * H + 2 * N * H + V * H) * s,
            ("quint8", "forward"): 8 * N + U * (H + 8) + N * H * s,
        }[row["provider"], row["mode"]]
        assert row["gbps"] == pytest.approx(moved / row["p50"] / 1e3, rel=1e-2)
        flops = {"forward": 2, "both": 6}[row["mode"]] * U * r * H if row["provider"] == "embkern" else 0
        assert row["gflops"] == pytest.approx(flops / row["p50"] / 1e3, rel=1e-2)


def test_plots_are_made_from_the_results(results):
    pytest.importorskip("matplotlib")
    _, directory = results
    plots.main(["--results", str(directory)])
    pictures = sorted(directory.glob("*.png"))
    assert [path.name for path in pictures] == [
        "gather_project_cpu_latency.png",
        "gather_project_cpu_speedup.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_a_provider_that_fails_fails_the_run_but_not_the_others(tmp_path, monkeypatch, capsys):
    def broken(problem):
        return Lookup(lambda ids: torch.zeros(len(ids), TINY.H), 0)

    monkeypatch.setitem(PROVIDERS, "embkern-out", Provider(broken))
    monkeypatch.setattr(gather_project, "copy_bandwidth", lambda device: 10.0)
    monkeypatch.setattr(gather_project, "gemm_peak", lambda dtype, device: 100.0)
    selection = "--device cpu --models tiny --counts 4 --ids zipf --dtypes fp32 --modes forward"
    providers = "--providers two-step embkern-out embkern --cell-seconds 0 --results"
    with pytest.raises(SystemExit, match="1"):
        gather_project.main([*selection.split(), *providers.split(), str(tmp_path)])
    contents = json.loads((tmp_path / "gather_project_cpu.json").read_text())
    assert [failure["provider"] for failure in contents["failures"]] == ["embkern-out"]
    assert {row["provider"] for row in contents["rows"]} == {"two-step", "embkern"}
    assert "FAILED embkern-out" in capsys.readouterr().out


def test_every_default_plan_names_known_shapes():
    for device in ("cpu", "cuda"):
        for quick in ([], ["--quick"]):
            tables = gather_project.plan(gather_project._parse(["--device", device, *quick]))
            assert tables
            assert all(cells for _, cells in tables)
            assert all(table.r in MODELS[table.model].ranks for table, _ in tables)

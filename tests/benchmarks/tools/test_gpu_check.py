"""gpu_check: the checklist's machinery with stubs, and its smoke stages rehearsed without a device."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import cosine_mse, gather_decode, gather_project, machine, runner, train
from benchmarks.tools import gpu_check
from benchmarks.tools.gpu_check import assertions, checklist, processes, smoke, table
from benchmarks.tools.gpu_check.kernels import KERNELS, cases
from benchmarks.tools.gpu_check.lines import append, read_lines
from benchmarks.tools.gpu_check.place import Device
from benchmarks.tools.gpu_check.processes import FAILED, PASSED, ROOT, SKIPPED, TAIL, TIMED_OUT, Result
from benchmarks.tools.gpu_check.stand_in import StandIn

NEEDED_BY_KERNELS = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pydantic", "pydantic_core", "annotated_types", "typing_inspection"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Blocked())
import embkern.ops, embkern.factors, embkern.layer, embkern.packed
import benchmarks.cosine_mse, benchmarks.gather_decode, benchmarks.gather_project
from benchmarks.tools.gpu_check import assertions, checklist, device, extension, kernels, smoke, stand_in
import tests.cuda.emulated
if {triton}:
    import embkern.triton.aot, benchmarks.tools.gpu_check.prepare, benchmarks.tools.tune_gather_project
"""


def test_kernels_and_their_benchmarks_import_without_pydantic():
    code = NEEDED_BY_KERNELS.replace("{triton}", str(importlib.util.find_spec("triton") is not None))
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_the_tests_of_a_device_are_found_without_pydantic():
    blocked = NEEDED_BY_KERNELS.split("import embkern")[0]
    given = ["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", *checklist.GPU_TESTS]
    code = f"{blocked}\nimport pytest\nsys.exit(pytest.main({given!r}))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:]


def test_the_packed_benchmark_has_a_table_without_the_methods(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "embkern.methods", None)  # as without pydantic
    monkeypatch.setattr(gather_decode, "SHAPE", (300, 96))
    given = "--device cpu --random --counts 5 --hidden 2 --quick --cell-seconds 0 --ratios 8 --threads 1"
    gather_decode.main([*given.split(), "--results", str(tmp_path)])
    contents = json.loads((tmp_path / "gather_decode_cpu.json").read_text())
    assert contents["table"] == "random codes"
    assert contents["failures"] == []
    assert {"embkern", "two-step"} <= {row["provider"] for row in contents["rows"]}
    assert "the table's codes are random" in capsys.readouterr().out


def test_without_a_device_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    command = [sys.executable, "-m", "benchmarks.tools.gpu_check", "--out", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2, ran.stderr
    assert "sees no CUDA device" in ran.stdout
    assert not list(tmp_path.glob("*.json"))


def stage(tmp_path, code, limit=60.0):
    command = [sys.executable, "-c", code]
    return processes.run_stage("stub", command, limit, {"PYTHONUNBUFFERED": "1"}, tmp_path / "log")


def test_stages_pass_fail_and_end_in_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "SHORTEST", 0.5)
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    passed = stage(tmp_path, "print('x' * 20000 + 'done')")
    assert (passed.status, passed.returncode) == (PASSED, 0)
    assert passed.tail.endswith("done\n")
    assert len(passed.tail) <= TAIL
    failed = stage(tmp_path, "import sys; print('why'); sys.exit(3)")
    assert (failed.status, failed.returncode, failed.tail) == (FAILED, 3, "why\n")
    assert stage(tmp_path, "pass", limit=0.4).status == SKIPPED

    # A stage that ignores the interrupt, and its child that would outlive it.
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(2.5); pathlib.Path({str(alive)!r}).touch()"
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); print('started'); time.sleep(60)"
    )
    start = time.monotonic()
    late = stage(tmp_path, code, limit=1.0)
    assert (late.status, late.tail) == (TIMED_OUT, "started\n")
    time.sleep(max(0.0, start + 4 - time.monotonic()))
    assert not alive.exists()
    log = (tmp_path / "log").read_text()
    assert log.count("== stub") == 3, "the log has all of it"
    assert "x" * 20000 in log
    checklist.summary([passed, failed, late])
    printed = capsys.readouterr().out
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("stub")] == [
        "passed",
        "failed",
        "timed",
    ]


DEVICE_STUB = """
import os, pathlib
from benchmarks.tools.gpu_check.lines import append
found = dict(device="NVIDIA Test-1 80GB", copy_gbps=1.0, gflops=dict(fp32=1.0))
append(pathlib.Path(os.environ["EMBKERN_RESULTS"], "kernels.jsonl"), {"environment": found})
"""


def writing(folder, line):
    """Code that writes a line about a kernel."""
    return f"open('{folder}/kernels.jsonl', 'a').write({json.dumps(line)!r} + chr(10))"


def stubs(*others):
    def command(code):
        return [sys.executable, "-c", code, "LIMIT"]

    first = checklist.Stage("0 device", "", command(DEVICE_STUB), 60)
    return [first, *(checklist.Stage(name, "", command(code), 60, needs) for name, code, needs in others)]


def test_a_failed_stage_stops_only_those_that_need_it(tmp_path, monkeypatch, capsys):
    line = {"case": "a kernel", "status": "wrong", "why": "error 1"}
    stages = stubs(
        (
            "1 kernels",
            f"open('{tmp_path}/kernels.jsonl', 'a').write({json.dumps(line)!r} + chr(10))",
            ["0 device"],
        ),
        ("2 extension", "import sys; sys.exit(3)", ["0 device"]),
        ("3 needs it", "print('never')", ["2 extension"]),
        ("5 tests", "print('=== 2 passed, 1 skipped in 1.00s ===')", ["0 device"]),
        ("6 last", "import os, sys; print(sys.argv[1], os.environ['EMBKERN_RESULTS'])", []),
    )
    monkeypatch.setattr(checklist, "checklist", lambda options: stages)
    assert checklist.main(["--out", str(tmp_path), "--limit-seconds", "100"]) == 1
    contents = json.loads((tmp_path / "gpu_check_nvidia_test_1_80gb.json").read_text())
    statuses = [row["status"] for row in contents["stages"]]
    assert statuses == [PASSED, PASSED, FAILED, SKIPPED, PASSED, PASSED]
    assert contents["stages"][2]["returncode"] == 3
    assert contents["tests"] == {"passed": 2, "skipped": 1}
    assert contents["kernels"] == [line]
    limit, results = contents["stages"][5]["tail"].split()
    assert 40 < int(limit) <= 51, "85 % of 60 s"
    assert results == str(tmp_path)
    printed = capsys.readouterr().out
    assert "3 needs it     skipped        0.0 s  2 extension did not pass" in printed
    assert printed.index("a kernel") < printed.index("0 device       passed"), "the table comes first"


def test_what_was_found_is_kept_when_it_is_stopped(tmp_path):
    line = {"case": "a kernel", "status": "right"}
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.tools.gpu_check import checklist
from tests.benchmarks.tools.test_gpu_check import stubs
slow = {writing(tmp_path, line)!r} + "; import time; time.sleep(60)"
checklist.checklist = lambda options: stubs(("1 kernels", slow, []), ("2 next", "pass", []))
checklist.main(["--out", {str(tmp_path)!r}])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    end = time.monotonic() + 60
    while not read_lines(tmp_path / "kernels.jsonl") and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "a kernel" in printed
    assert "next" not in printed, "nothing is started any more"
    contents = json.loads((tmp_path / "gpu_check_nvidia_test_1_80gb.json").read_text())
    assert contents["kernels"] == [line]


def options(*given):
    return checklist._parse([*given])


def test_the_stages_run_what_exists(tmp_path):
    stages = {stage.name: stage for stage in checklist.checklist(options("--out", str(tmp_path)))}
    assert sum(stage.seconds for name, stage in stages.items() if name < "3") <= 410
    modules = {
        "3 lookup": gather_project,
        "3 packed": gather_decode,
        "3 loss": cosine_mse,
        "3 training": train,
    }
    for name, stage in stages.items():
        assert all(need in stages for need in stage.needs)
        assert 0 < stage.share <= 1
        given = ["9" if part == "LIMIT" else part for part in stage.command]
        if name in modules:
            module = modules[name]
            parsed = module._parse(given[given.index(module.__name__.rpartition(".")[2]) + 1 :])
            assert (parsed.device, parsed.limit_seconds) == ("cuda", 9)
        elif "-m" in given and given[given.index("-m") + 1].startswith("benchmarks.tools.gpu_check"):
            assert importlib.util.find_spec(given[given.index("-m") + 1]) is not None
    smoke_only = checklist.checklist(options("--smoke", "--out", str(tmp_path)))
    assert [stage.name[0] for stage in smoke_only] == ["0", "0", "1", "2"]
    assert sum(stage.seconds for stage in smoke_only if stage.name != "0 extension") < 300
    with pytest.raises(SystemExit):
        options("--rehearse")
    assert callable(gpu_check.main), "python -m benchmarks gpu_check"


def test_every_module_with_tests_of_a_device_is_run():
    listed = [ROOT / path for path in (*checklist.GPU_TESTS, *checklist.GPU_TESTS_OF_METHODS)]
    for path in (ROOT / "tests").rglob("test_*.py"):
        marked = re.search(r"mark\.gpu|def test\w*\([^)]*\bdevice\b", path.read_text())
        if marked and path != Path(__file__):
            assert any(path == each or each in path.parents for each in listed), path


def test_counts_of_the_tests_are_read_from_the_last_line():
    tail = "tests/a.py::b PASSED\n=== 1 failed, 20 passed, 3 skipped, 900 deselected in 12.34s ===\n"
    counts = checklist.test_counts([Result("5 tests", [], FAILED, tail=tail)])
    assert counts == {"failed": 1, "passed": 20, "skipped": 3, "deselected": 900}


def test_every_kernel_is_checked_in_bf16_and_fp32_aligned_and_odd():
    found = {case.name for case in cases(Device())}
    assert len(found) == sum(len(kernel.shapes) * 2 for kernel in KERNELS), "names are distinct"
    for kernel in KERNELS:
        for dtype in ("bf16", "fp32"):
            assert {
                f"{kernel.backend} {kernel.name} {dtype} {shape}" for shape in ("aligned", "odd")
            } <= found
    assert {kernel.op for kernel in KERNELS} == {
        "gather_project",
        "gather_decode",
        "cosine_mse",
        "autoencoder",
    }


def test_no_triton_kernel_is_left_out():
    triton = pytest.importorskip("triton")
    from benchmarks.tools.gpu_check.prepare import recorded_launches
    from embkern.triton import autoencoder, gather_decode, gather_project
    from embkern.triton import cosine_mse as loss

    place = StandIn()
    mine = [case for case in cases(place) if case.kernel.backend == "triton" and case.dtype == "fp32"]
    launched = {launch.kernel.__name__ for case in mine for launch in recorded_launches(case, place)}
    defined = {
        name
        for module in (autoencoder, gather_decode, gather_project, loss)
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, triton.JITFunction)
    }
    assert launched == defined


# A worker in which one kernel hangs, one crashes and one loses the context; the others are right.
BROKEN_WORKER = """
import json, os, sys, time
given = sys.argv[sys.argv.index("--worker") + 1:]
results = open(sys.argv[sys.argv.index("--results") + 1], "a")
for name in given:
    if name == "hangs": time.sleep(60)
    if name == "crashes": os.kill(os.getpid(), 11)
    lost = name == "loses"
    line = {"case": name, "status": "wrong" if lost else "right", "why": "assert"}
    results.write(json.dumps(line) + chr(10))
    results.flush()
    if lost: sys.exit(9)
"""


def test_a_process_that_breaks_takes_no_other_kernel_with_it(tmp_path, monkeypatch):
    worker, results = tmp_path / "worker.py", tmp_path / "kernels.jsonl"
    worker.write_text(BROKEN_WORKER)
    command = [sys.executable, str(worker), "--results", str(results)]
    monkeypatch.setattr(smoke, "_command", lambda options: command)
    monkeypatch.setattr(smoke, "CASE_SECONDS", 2.0)
    names = ["a", "loses", "b", "crashes", "c", "hangs", "d"]
    share, deadline = smoke._Share(names), time.monotonic() + 60
    options = argparse.Namespace(rehearse=False)
    share.start(options, deadline)
    lines = {}
    while share.process:
        time.sleep(0.05)
        if line := share.look(lambda: read_lines(results), options, deadline):
            lines[line["case"]] = line
            append(results, line)
    assert lines["crashes"]["why"] == "the process ended with status -11"
    assert lines["hangs"]["why"] == "no end after 2 s"
    status = {line["case"]: line["status"] for line in read_lines(results)}
    assert status == {name: "right" if len(name) == 1 else "wrong" for name in names}


def test_processes_take_turns_to_time(tmp_path):
    with smoke.Turn(tmp_path / "lock") as first, smoke.Turn(tmp_path / "lock") as second:
        assert not first.alone(time.monotonic() - 1), "the second still judges"
        second.__exit__()
        assert first.alone(time.monotonic() - 1)


def test_the_table_shows_first_what_is_wrong():
    rows = table.merged(
        [
            {"case": "good", "shape": "1x2", "status": "right"},
            {"case": "bad", "shape": "3x4", "status": "wrong", "why": "error 1.0e+00"},
            {"case": "good", "p50": 12.34, "floor": 6.0, "ratio": 2.06, "alone": True},
        ]
    )
    lines = table.table(rows)
    assert lines[1].split() == ["bad", "3x4", "WRONG", "error", "1.0e+00"]
    assert lines[2].split() == ["good", "1x2", "right", "12.3", "6.0", "2.1"]


class Wrong(Device):
    """A place on the CPU where the torch backend runs under a kernel's name, or something wrong does."""

    type, rehearsal = "cpu", True
    replays = "second call"

    def __init__(self, fault=None):
        self.fault, self.calls = fault, 0

    def unavailable(self, op, backend):
        return None

    def synchronize(self):
        pass

    def release(self):
        pass

    def lost(self):
        return None

    def op(self, name, backend):
        from embkern.ops import reference

        def call(ids, *factors):
            self.calls += 1
            out = reference.gather_project_forward(ids, *factors)
            if self.fault == "wrong":
                out[-1, -1] += 1
            if self.fault == "unwritten":
                out = torch.where(torch.arange(len(out))[:, None] == 0, torch.empty_like(out), out)
            if self.fault == "other bits" and self.calls > 1:
                out[0, 0] *= 1 + 1e-6
            if self.fault == "raises":
                raise RuntimeError("CUDA error: invalid argument\nmore")
            return out

        return call

    def replay(self, call, change):
        stale = call()
        change()
        return stale if self.fault == "stale" else call()


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (None, None),
        ("wrong", "result 0: error"),
        ("unwritten", "result 0: error inf"),
        ("other bits", "a second call gave other bits"),
        ("stale", "the second call did not read the new inputs"),
        ("raises", "RuntimeError: CUDA error: invalid argument"),
    ],
)
def test_a_kernel_is_judged_by_numbers_bits_and_replay(fault, why):
    place = Wrong(fault)
    case = next(case for case in cases(Wrong()) if case.name == "triton gather_project fp32 odd")
    line, lost = smoke.judged_line(case, place)
    assert lost is None
    assert line["status"] == ("wrong" if fault else "right"), line
    if fault:
        assert why in line["why"]


def test_a_call_that_returns_is_no_assertion(monkeypatch, capsys):
    good = assertions.Assertion("good", "gather_project", "triton", "out of range", lambda place: None)
    assert assertions._fault(good, 0, "", False) == "the call returned"
    assert "without the message" in assertions._fault(good, 1, "device-side assert", False)
    assert "no device-side" in assertions._fault(good, 1, "out of range", False)
    assert assertions._fault(good, 1, "out of range ... device-side assert triggered", False) is None


class LostDevice:
    """CUDA as torch shows it: an error at a number of synchronisations."""

    def __init__(self, monkeypatch, errors):
        self.errors = errors
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)

    def synchronize(self):
        self.errors -= 1
        if self.errors >= 0:
            raise RuntimeError("CUDA error: device-side assert triggered\nmore of it")


def test_a_lost_context_is_told_from_an_error_that_is_cleared(monkeypatch):
    assert machine.lost_context() is None, "nothing ran on a device"
    LostDevice(monkeypatch, errors=0)
    assert machine.lost_context() is None
    LostDevice(monkeypatch, errors=1)
    assert machine.lost_context() is None
    LostDevice(monkeypatch, errors=2)
    assert machine.lost_context() == "RuntimeError: CUDA error: device-side assert triggered"


def test_a_run_ends_with_its_context_and_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    given = argparse.Namespace(limit_seconds=60, results=tmp_path, device="cuda", threads=None)
    report = runner.Bench("test", [], given)
    report.rows = [{"p50": 1}]
    with report.recorded("fine", "here"):
        raise RuntimeError("out of memory")
    LostDevice(monkeypatch, errors=9)
    with pytest.raises(SystemExit, match="1"), report.recorded("broken", "there"):
        raise RuntimeError("CUDA error: device-side assert triggered")
    contents = json.loads((tmp_path / "test_cuda.json").read_text())
    assert contents["rows"] == [{"p50": 1}]
    assert [failure["provider"] for failure in contents["failures"]] == ["fine", "broken"]
    assert "its CUDA context is lost" in capsys.readouterr().out


BREAKING_TESTS = """
import pytest, torch
from benchmarks import machine
from tests.conftest import pytest_runtest_logfinish, pytest_runtest_makereport
broken = []
machine.lost_context = lambda: broken and broken[0] or None
torch.cuda.is_initialized = lambda: True
"""
TESTS = """
import pytest
from conftest import broken
@pytest.mark.parametrize("n", range(8))
def test_one(n):
    if n == 3:
        broken.append("device-side assert")
    assert not broken
"""


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_tests_stop_where_the_context_is_lost(tmp_path, workers):
    """In one process no test follows; xdist's worker is replaced, and the other tests run."""
    (tmp_path / "conftest.py").write_text(BREAKING_TESTS)
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", str(tmp_path)]
    if workers:
        pytest.importorskip("xdist")
        command += ["-n", str(workers)]
    unlike = ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_ADDOPTS")
    variables = {name: value for name, value in os.environ.items() if name not in unlike}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), variables.get("PYTHONPATH", "")])
    ran = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert ran.returncode != 0
    assert "device-side assert" in ran.stdout
    lines = [line for line in ran.stdout.splitlines() if "PASSED" in line]
    passed = {int(number) for line in lines for number in re.findall(r"test_one\[(\d)\]", line)}
    assert passed == (set(range(8)) - {3} if workers else {0, 1, 2}), ran.stdout


@pytest.mark.slow
def test_a_rehearsal_passes(tmp_path):
    command = [sys.executable, "-m", "benchmarks.tools.gpu_check", "--smoke", "--rehearse"]
    ran = subprocess.run(
        [*command, "--out", str(tmp_path), "--limit-seconds", "3000"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    contents = json.loads((tmp_path / "gpu_check_rehearsal.json").read_text())
    reasons = {row["why"] for row in contents["kernels"] if row["status"] == "not run"}
    if reasons:  # the interpreter does not run here, and nothing else may be left out
        assert all("interpreter" in reason or "C++ compiler" in reason for reason in reasons)
        pytest.skip("; ".join(reasons))
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert [row["status"] for row in contents["stages"]] == [PASSED] * 4
    assert {row["status"] for row in contents["kernels"]} == {"right"}
    assert all("p50" in row for row in contents["kernels"])

"""The stages: their order, time limits, results and summary, with stubs; and a rehearsal without a device."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks import cosine_mse, gather_decode, gather_project, train
from benchmarks.tools import gpu_check
from benchmarks.tools.gpu_check import checklist, processes, run, suite
from benchmarks.tools.gpu_check.lines import FILE, all_lines, read_lines
from benchmarks.tools.gpu_check.processes import (
    FAILED,
    PASSED,
    ROOT,
    SKIPPED,
    TAIL,
    TIMED_OUT,
    UNNECESSARY,
)


def test_without_a_device_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    command = [sys.executable, "-m", "benchmarks.tools.gpu_check", "--out", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2, ran.stderr
    assert "sees no CUDA device" in ran.stdout
    assert [row["name"] for row in results(tmp_path)["stages"]] == ["0 device"]


def stage(tmp_path, code, limit=60.0):
    command = [sys.executable, "-c", code]
    return processes.run_stage("stub", "a stub", command, limit, {"PYTHONUNBUFFERED": "1"}, tmp_path / "log")


def test_stages_pass_fail_and_end_in_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    passed = stage(tmp_path, "print('x' * 20000 + 'done')")
    assert (passed.status, passed.returncode) == (PASSED, 0)
    assert passed.tail.endswith("done\n")
    assert len(passed.tail) <= TAIL
    failed = stage(tmp_path, "import sys; print('why'); sys.exit(3)")
    assert (failed.status, failed.returncode, failed.tail) == (FAILED, 3, "why\n")

    # A stage that ignores the interrupt, and its child that would outlive it.
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(2.5); pathlib.Path({str(alive)!r}).touch()"
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); print('started'); time.sleep(60)"
    )
    start = time.monotonic()
    late = stage(tmp_path, code, limit=1.0)
    assert (late.status, late.tail) in ((TIMED_OUT, "started\n"), (TIMED_OUT, "")), "a slow start"
    time.sleep(max(0.0, start + 4 - time.monotonic()))
    assert not alive.exists()
    log = (tmp_path / "log").read_text()
    assert log.count("== stub") == 3, "the log has all of it"
    assert "x" * 20000 in log
    run.summary([passed, failed, late])
    printed = capsys.readouterr().out
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("stub")] == [
        "passed",
        "failed",
        "timed",
    ]


APPEND = """
import os, pathlib
from benchmarks.tools.gpu_check.lines import FILE, append, plan
results = pathlib.Path(os.environ["EMBKERN_RESULTS"], FILE)
"""
FOUND = dict(device="NVIDIA Test-1 80GB", copy_gbps=1.0, gflops=dict(fp32=1.0))
DEVICE_STUB = APPEND + f"append(results, dict(environment={FOUND}))"
LINE = {"kernel": "a kernel", "status": "wrong", "why": "error 1", "dtype": "fp32"}


def stubs(*others):
    """Stages that run code; a triple has further fields."""

    def command(code):
        return [sys.executable, "-c", code, "LIMIT"]

    stages = [run.Stage("0 device", "", command(DEVICE_STUB), 60)]
    for name, code, *fields in others:
        stages.append(run.Stage(name, "", command(code), **{"seconds": 60, **(fields[0] if fields else {})}))
    return stages


def results(folder):
    (path,) = folder.glob("gpu_check_*.json")
    return json.loads(path.read_text())


def archived(folder):
    with tarfile.open(folder / run.ARCHIVE) as archive:
        return {Path(name).name: archive.extractfile(name).read() for name in archive.getnames()}


def test_a_failed_stage_stops_no_other(tmp_path, monkeypatch, capsys):
    (tmp_path / "older.json").touch()
    os.utime(tmp_path / "older.json", (0, 0))
    kernels = APPEND + f"plan(results, 'kernel', ['a kernel', 'another'])\nappend(results, {LINE})"
    tests = APPEND + (
        "plan(results, 'test', ['a', 'b', 'c'])\n"
        "append(results, dict(test='a', status='passed'))\n"
        "append(results, dict(test='b', status='failed', why='assert 1'))"
    )
    stages = stubs(
        ("1 kernels", kernels),
        ("2 extension", "import sys; sys.exit(3)"),
        ("3 hangs", "import time; time.sleep(60)", {"seconds": 3}),
        ("4 build", "print('built')", {"unless": "2 extension"}),
        ("5 build", "print('never')", {"unless": "4 build"}),
        ("6 tests", tests),
        ("7 module", "print('never')", {"modules": ["no_such_module"]}),
        ("8 long", "print('never')", {"optional": True}),
        ("9 last", "import os, sys; print(sys.argv[1], os.environ['EMBKERN_RESULTS'])"),
    )
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    monkeypatch.setattr(run, "SHORTEST", 1.0)
    monkeypatch.setattr(run, "WORTH_IT", 500.0)
    monkeypatch.setattr(checklist, "checklist", lambda options: stages)
    assert checklist.main(["--out", str(tmp_path), "--limit-seconds", "400"]) == 1
    contents = results(tmp_path)
    statuses = [PASSED, PASSED, FAILED, TIMED_OUT, PASSED, UNNECESSARY, PASSED, SKIPPED, UNNECESSARY, PASSED]
    assert [row["status"] for row in contents["stages"]] == statuses
    assert contents["stages"][2]["returncode"] == 3
    assert contents["tests"] == {"passed": 1, "failed": 1, "left over": 1}
    assert contents["left_over"] == {"kernel": ["another"], "test": ["c"]}
    assert contents["lines"] == [LINE]
    limit, folder = contents["stages"][-1]["tail"].split()
    assert int(limit) == 51, "85 % of 60 s"
    assert folder == str(tmp_path)
    printed = capsys.readouterr().out
    assert "no_such_module is not installed" in printed
    assert "WRONG: a kernel: error 1" in printed
    assert "NOT RUN: another: no time was left" in printed
    assert "left over, test: 1: c" in printed
    assert printed.index("WRONG: a kernel") < printed.index("0 device       passed"), "the table comes first"
    kept = archived(tmp_path)
    assert set(kept) == {FILE, run.LOG, "gpu_check_nvidia_test_1_80gb.json"}
    assert kept[run.LOG] == (tmp_path / run.LOG).read_bytes()


@pytest.mark.slow
def test_everything_together_ends_in_time(tmp_path, monkeypatch):
    """Every stage hangs and ignores the interrupt; the last ones find no time and are not started."""
    hangs = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    stages = stubs(*((f"{number} hangs", hangs, {"seconds": 4}) for number in range(1, 8)))
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    monkeypatch.setattr(run, "SHORTEST", 0.5)
    monkeypatch.setattr(checklist, "checklist", lambda options: stages[1:])
    assert checklist.main(["--out", str(tmp_path), "--limit-seconds", "9"]) == 1
    (path,) = tmp_path.glob("gpu_check_*.json")
    statuses = [row["status"] for row in json.loads(path.read_text())["stages"]]
    late = statuses.count(TIMED_OUT)
    assert 1 <= late <= 3, "three times 4 s are over 9"
    assert statuses == [TIMED_OUT] * late + [SKIPPED] * (7 - late)


RUN_OF_STUBS = """
import sys
sys.path.insert(0, {root!r})
from benchmarks.tools.gpu_check import checklist
from tests.benchmarks.tools.gpu_check.test_checklist import APPEND, LINE, stubs
slow = APPEND + f"append(results, {{LINE}})" + "; import time; time.sleep(60)"
stages = stubs(("1 first", "print('the first')"), ("2 kernels", slow), ("3 next", "pass"))
checklist.checklist = lambda options: stages
checklist.main(["--out", {out!r}])
"""


def stopped_by(which, folder):
    """Run stubs, signal while the second stage waits; return the exit status and what was printed."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_OF_STUBS.format(root=str(ROOT), out=str(folder))],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + 120
    while not read_lines(folder / FILE, "kernel") and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(which)
    printed, _ = process.communicate(timeout=120)
    return process.returncode, printed


def test_what_was_found_is_kept_when_it_is_stopped(tmp_path):
    status, printed = stopped_by(signal.SIGTERM, tmp_path)
    assert status != 0
    assert "a kernel" in printed
    assert "next" not in printed, "nothing is started any more"
    assert results(tmp_path)["lines"] == [LINE]
    kept = archived(tmp_path)
    assert json.loads(kept["gpu_check_nvidia_test_1_80gb.json"])["lines"] == [LINE]
    assert kept[FILE] == (tmp_path / FILE).read_bytes()


def test_a_kill_leaves_a_whole_archive_of_the_stages_that_ended(tmp_path):
    stopped_by(signal.SIGKILL, tmp_path)
    kept = archived(tmp_path)
    assert b"the first" in kept[run.LOG]
    contents = json.loads(kept["gpu_check_nvidia_test_1_80gb.json"])
    assert [row["name"] for row in contents["stages"]] == ["0 device", "1 first"]
    assert all_lines(tmp_path / FILE)[-1] == LINE, "and the file of lines has what came later"


def options(*given):
    return checklist._parse([*given])


def test_the_stages_run_what_exists(tmp_path):
    stages = {stage.name: stage for stage in checklist.checklist(options("--out", str(tmp_path)))}
    # Where stage 0 takes half a minute, all others have their time.
    assert 30 + sum(each.seconds for name, each in stages.items() if "1" <= name < "8") <= checklist.SECONDS
    assert options().limit_seconds + processes.PATIENCE * 2 < 560
    modules = {
        "8 lookup": gather_project,
        "8 packed": gather_decode,
        "8 loss": cosine_mse,
        "3 training": train,
    }
    for name, each in stages.items():
        assert each.unless is None or each.unless in stages
        given = ["9" if part == "LIMIT" else part for part in each.command]
        if name in modules:
            module = modules[name]
            parsed = module._parse(given[given.index(module.__name__.rpartition(".")[2]) + 1 :])
            assert (parsed.device, parsed.limit_seconds, parsed.no_compile) == ("cuda", 9, True)
        else:
            assert importlib.util.find_spec(given[given.index("-m") + 1]) is not None
    smoke_only = checklist.checklist(options("--smoke", "--out", str(tmp_path)))
    assert {each.name[0] for each in smoke_only} == set("012")
    rehearsal = checklist.checklist(options("--rehearse", "--out", str(tmp_path)))
    assert [each.name for each in rehearsal] == [name for name in stages if name[0] != "8"]
    assert callable(gpu_check.main), "python -m benchmarks gpu_check"


def test_every_module_with_tests_of_a_device_is_run():
    listed = [ROOT / path for path in (*suite.TESTS, *suite.TESTS_OF_METHODS)]
    for path in (ROOT / "tests").rglob("test_*.py"):
        marked = re.search(r"mark\.gpu|def test\w*\([^)]*\bdevice\b", path.read_text())
        if marked and path != Path(__file__):
            assert any(path == each or each in path.parents for each in listed), path


@pytest.mark.slow
def test_a_rehearsal_passes(tmp_path):
    command = [sys.executable, "-m", "benchmarks.tools.gpu_check", "--rehearse", "--only", "fp32 odd"]
    ran = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    contents = results(tmp_path)
    lines = contents["lines"]
    reasons = {line["why"] for line in lines if line.get("status") == "not run"}
    if reasons:  # the interpreter does not run here, and nothing else may be left out
        assert all("interpreter" in reason or "C++ compiler" in reason for reason in reasons)
        pytest.skip("; ".join(reasons))
    assert ran.returncode == 0, ran.stdout[-4000:]
    statuses = {row["name"]: row["status"] for row in contents["stages"]}
    assert set(statuses.values()) - {UNNECESSARY} == {PASSED}
    assert {name for name, status in statuses.items() if status == UNNECESSARY} == {"0 build"}
    assert contents["left_over"] == {}
    names = {
        key: {line[key] for line in lines if key in line}
        for key in ("kernel", "timed kernel", "headline", "compiled headline", "tile", "timed tile")
    }
    assert names["kernel"] == names["timed kernel"]
    assert names["headline"] == names["compiled headline"] == {"lookup", "decoding", "loss", "packed head"}
    assert names["tile"] == names["timed tile"]
    assert len(names["tile"]) == 12
    assert contents["tests"].keys() <= {"passed", "skipped"}

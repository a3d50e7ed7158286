"""The stages: their order, time limits and summary, with stubs; and a rehearsal without a device."""

from __future__ import annotations

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

from benchmarks import cosine_mse, gather_decode, gather_project, train
from benchmarks.tools import gpu_check
from benchmarks.tools.gpu_check import checklist, processes
from benchmarks.tools.gpu_check.lines import read_lines
from benchmarks.tools.gpu_check.processes import FAILED, PASSED, ROOT, SKIPPED, TAIL, TIMED_OUT, Result


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
from tests.benchmarks.tools.gpu_check.test_checklist import stubs
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

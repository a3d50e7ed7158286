"""After an error that CUDA keeps, a benchmark and a run of the tests end."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from benchmarks import machine, runner
from benchmarks.tools.gpu_check.processes import ROOT


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


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
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

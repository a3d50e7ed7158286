"""Stage 6: a line per test, also when a process ends with a lost CUDA context; what is left over."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks.tools.gpu_check.lines import all_lines, left_over
from benchmarks.tools.gpu_check.processes import ROOT
from benchmarks.tools.gpu_check.table import counts_of_tests, report

TESTS = """
import pytest, torch
import benchmarks.machine

torch.cuda.is_initialized = lambda: True
benchmarks.machine.lost_context = lambda: None

def test_passes(): pass
def test_fails(): assert 1 == 2
def test_skips(): pytest.skip("no reason")
def test_loses():
    benchmarks.machine.lost_context = lambda: "CUDA error: device-side assert triggered"
    assert False
def test_comes_after(): pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("xdist", [True, False])
def test_a_line_per_test_and_a_lost_context(tmp_path, xdist):
    if xdist:
        pytest.importorskip("xdist")
    (tmp_path / "test_stub.py").write_text(TESTS)
    results = tmp_path / "lines.jsonl"
    without = "" if xdist else "suite.workers = lambda: []; "
    code = "import sys\nfrom benchmarks.tools.gpu_check import suite\n"
    code += f"{without}sys.exit(suite.main(sys.argv[1:]))"
    given = ["--rehearse", "--results", str(results), "--tests", str(tmp_path)]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ran = subprocess.run(
        [sys.executable, "-c", code, *given],
        cwd=ROOT,
        env=variables | {"PYTEST_ADDOPTS": "-p tests.conftest"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode != 0
    lines = all_lines(results)
    assert "the CUDA context of this process is lost" in ran.stdout, ran.stdout + ran.stderr
    if xdist:  # a new process takes the test that is left
        assert counts_of_tests(lines) == {"passed": 2, "failed": 2, "skipped": 1}
        assert left_over(lines) == {}
    else:
        assert counts_of_tests(lines) == {"passed": 1, "failed": 2, "skipped": 1, "left over": 1}
        assert [name.rpartition("::")[2] for name in left_over(lines)["test"]] == ["test_comes_after"]
    printed = report(lines)
    for name, why in (("test_fails", "assert 1 == 2"), ("test_loses", "assert False")):
        assert f"FAILED: test_stub.py::{name}: {why}" in printed

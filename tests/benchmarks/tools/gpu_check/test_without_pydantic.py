"""The kernels, their benchmarks and the tests of a device work without pydantic."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from benchmarks import gather_decode
from benchmarks.tools.gpu_check import suite
from benchmarks.tools.gpu_check.processes import ROOT

NEEDED_BY_KERNELS = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pydantic", "pydantic_core", "annotated_types", "typing_inspection"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Blocked())
import embkern.ops, embkern.tables, embkern.nn
import benchmarks.cosine_mse, benchmarks.gather_decode, benchmarks.gather_project
from benchmarks.tools.gpu_check import assertions, build, checklist, device, extension, headlines, kernels
from benchmarks.tools.gpu_check import packages, smoke, stand_in, suite, timings
import tests.cuda.emulated
if {triton}:
    import embkern.triton.aot, benchmarks.tools.gpu_check.prepare, benchmarks.tools.gpu_check.tiles
"""


def test_kernels_and_their_benchmarks_import_without_pydantic():
    code = NEEDED_BY_KERNELS.replace("{triton}", str(importlib.util.find_spec("triton") is not None))
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_the_tests_of_a_device_are_found_without_pydantic():
    blocked = NEEDED_BY_KERNELS.split("import embkern")[0]
    given = ["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", *suite.TESTS]
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

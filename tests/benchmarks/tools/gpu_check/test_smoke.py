"""Stage 1 and 2: which kernels are checked, how they are judged and timed, and assertions."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import time

import pytest
import torch

from benchmarks.tools.gpu_check import assertions, smoke, table
from benchmarks.tools.gpu_check.kernels import KERNELS, cases
from benchmarks.tools.gpu_check.lines import append, read_lines
from benchmarks.tools.gpu_check.place import Device
from benchmarks.tools.gpu_check.stand_in import StandIn


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
        "low_rank_cross_entropy",
        "packed_cross_entropy",
        "packed_logits",
    }


def test_no_triton_kernel_is_left_out():
    triton = pytest.importorskip("triton")
    import embkern.triton
    from benchmarks.tools.gpu_check.prepare import recorded_launches

    place = StandIn()
    mine = [case for case in cases(place) if case.kernel.backend == "triton"]
    launched = {launch.kernel.__name__ for case in mine for launch in recorded_launches(case, place)}
    defined = {
        name
        for module in pkgutil.walk_packages(embkern.triton.__path__, "embkern.triton.")
        for name, value in vars(importlib.import_module(module.name)).items()
        if name.endswith("_kernel") and isinstance(value, triton.JITFunction)
    }
    assert launched == defined


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

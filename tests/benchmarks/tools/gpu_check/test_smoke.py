"""Stages 1, 2 and 5: which kernels and tiles are checked, how they are judged, and assertions."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch

from benchmarks.tools.gpu_check import assertions, smoke
from benchmarks.tools.gpu_check.kernels import KERNELS, cases
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


def test_three_kernels_have_four_tiles_that_differ():
    pytest.importorskip("triton")
    from benchmarks.tools.gpu_check.tiles import VARIANTS, tile_cases, tile_with
    from embkern.triton.tiles import REPRESENTATIVE

    found = list(tile_cases(Device()))
    assert len({case.name for case in found}) == len(found) == 12
    shape = found[0].shape
    for kernel, variants in VARIANTS.items():
        tiles = [tile_with(kernel, change, shape, torch.bfloat16, REPRESENTATIVE[90]) for change in variants]
        assert len(set(tiles)) == 4, tiles
        assert variants[0] == {}, "the one in use"


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

"""The tuner, as far as it runs without a device."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.tools import tune_gather_project as tune
from embkern.triton.tiles import REPRESENTATIVE, Tile, shared_estimate

pytestmark = pytest.mark.slow


def test_without_a_device_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_candidates_differ_and_fit():
    device = REPRESENTATIVE[80]
    for kernel in tune.KERNELS:
        for length in tune.LENGTHS:
            for r in tune.RANKS:
                for dtype in (torch.bfloat16, torch.float32):
                    case = tune.Case(kernel, dtype, length, r)
                    found = tune.candidates(case, device)
                    assert 2 <= len(found) == len(set(found)), case
                    for tile in found:
                        assert shared_estimate(kernel, tile, r, dtype.itemsize) <= device.shared_bytes


def test_candidates_that_spill_are_dropped(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    greedy, modest = Tile(128, 128, 64, 4, 2), Tile(16, 32, 64, 4, 2)
    monkeypatch.setattr(tune, "candidates", lambda *_: [greedy, modest])
    arguments = ["--kernels", "forward", "--lengths", "many", "--ranks", "75"]
    assert tune.main(["--compile-only", "--capability", "90", *arguments]) == 0
    *rows, summary = capsys.readouterr().out.splitlines()
    assert [row.endswith("dropped") for row in rows] == [True, False]
    assert "1 of 2 candidates kept" in summary

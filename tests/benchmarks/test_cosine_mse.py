"""The benchmark of the loss: its plan and the fields it writes."""

import itertools
import json

import pytest

from benchmarks import cosine_mse
from benchmarks.losses import TERMS
from benchmarks.peers import BOTH, FORWARD
from benchmarks.runner import DTYPES

pytestmark = pytest.mark.slow


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
        assert row["share"] == pytest.approx(row["gbps"] / 10, abs=2e-4)
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


def test_every_default_plan_names_known_terms_and_dtypes():
    for device, quick in itertools.product(("cpu", "cuda"), ([], ["--quick"])):
        cells = cosine_mse.plan(cosine_mse._parse(["--device", device, *quick]))
        assert (4096, 768, BOTH) in {(cell.N, cell.H, cell.mode) for cell in cells}
        assert all(cell.dtype in DTYPES and cell.terms in TERMS for cell in cells)

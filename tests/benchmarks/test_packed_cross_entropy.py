"""The benchmark of the packed cross-entropy: the fields it writes, and that a wrong loss is not timed."""

import json

import pytest

from benchmarks import packed_cross_entropy, packed_head

QUICK = ["--device", "cpu", "--threads", "1", "--cell-seconds", "0", "--ratios", "8"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(packed_head, "SMOLLM2", (301, 64))


def test_a_run_writes_every_field(tmp_path):
    packed_cross_entropy.main([*QUICK, "--tokens", "3", "70", "--results", str(tmp_path)])
    contents = json.loads((tmp_path / "packed_cross_entropy_cpu.json").read_text())
    assert contents["failures"] == []
    modes, names = packed_cross_entropy.MODES, packed_cross_entropy.DEFAULT
    cells = {(row["mode"], row["N"], row["provider"]) for row in contents["rows"]}
    assert cells == {(mode, N, name) for mode in modes for N in (3, 70) for name in names}
    for row in contents["rows"]:
        assert (row["V"], row["H"], row["asked"]) == (301, 64, 8)
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert row["extra_memory"] is None or row["extra_memory"] >= 0
        if row["provider"] != "dense-fp32":
            assert row["error"] < 1e-4


def test_a_wrong_loss_is_not_timed(tmp_path, monkeypatch):
    right = packed_cross_entropy.PackedEmbedding.head

    def head(layer):
        made = right(layer)
        made.bias = made.scales  # any bias
        return made

    monkeypatch.setattr(packed_cross_entropy.PackedEmbedding, "head", head)
    selection = ["--tokens", "3", "--modes", "forward", "--providers", "dense-fp32", "embkern"]
    with pytest.raises(SystemExit, match="1"):
        packed_cross_entropy.main([*QUICK, *selection, "--results", str(tmp_path)])
    contents = json.loads((tmp_path / "packed_cross_entropy_cpu.json").read_text())
    assert {row["provider"] for row in contents["rows"]} == {"dense-fp32"}
    assert "relative error" in contents["failures"][0]["error"]

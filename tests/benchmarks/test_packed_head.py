"""The benchmark of the packed head: the fields it writes, and that wrong logits are not timed."""

import json

import pytest

from benchmarks import packed_head

QUICK = ["--device", "cpu", "--threads", "1", "--cell-seconds", "0", "--tables", "smollm2", "--ratios", "8"]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(packed_head, "SMOLLM2", (301, 64))


def test_a_run_of_the_packed_head_writes_every_field(tmp_path, small):
    packed_head.main([*QUICK, "--hidden", "1", "40", "--results", str(tmp_path)])
    contents = json.loads((tmp_path / "packed_head_cpu.json").read_text())
    assert contents["failures"] == []
    cells = {(row["mode"], row["N"], row["provider"]) for row in contents["rows"]}
    forward = {("forward", N, name) for N in (1, 40) for name in packed_head.DEFAULT}
    backward = {("backward", N, name) for N in (1, 40) for name in ("dense-fp32", "dense-bf16", "embkern")}
    assert cells - {each for each in cells if each[2] == "qint8"} == {
        each for each in forward | backward if each[2] != "qint8"
    }
    for row in contents["rows"]:
        assert (row["V"], row["H"], row["asked"]) == (301, 64, 8)
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        if row["provider"] == "embkern":
            assert row["error"] < 1e-5


def test_wrong_logits_are_not_timed(tmp_path, small, monkeypatch):
    right = packed_head.PackedEmbedding.head
    monkeypatch.setattr(
        packed_head.PackedEmbedding, "head", lambda layer: lambda hidden: right(layer)(hidden) * 1.001
    )
    selection = ["--hidden", "3", "--modes", "forward", "--providers", "dense-fp32", "embkern"]
    with pytest.raises(SystemExit, match="1"):
        packed_head.main([*QUICK, *selection, "--results", str(tmp_path)])
    contents = json.loads((tmp_path / "packed_head_cpu.json").read_text())
    assert {row["provider"] for row in contents["rows"]} == {"dense-fp32"}
    assert "relative error 1.00e-03" in contents["failures"][0]["error"]

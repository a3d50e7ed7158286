"""The benchmark of packed lookups: the fields it writes, and that a wrong lookup is not timed."""

import json

import pytest

from benchmarks import gather_decode

pytestmark = pytest.mark.slow


QUICK = ["--device", "cpu", "--threads", "1", "--cell-seconds", "0", "--ratios", "8"]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(gather_decode, "SHAPE", (1009, 96))


def test_a_run_of_packed_lookups_writes_every_field(tmp_path, small, capsys):
    selection = "--random --counts 1 300 --hidden 1 40 --no-compile"
    gather_decode.main([*QUICK, *selection.split(), "--results", str(tmp_path)])
    contents = json.loads((tmp_path / "gather_decode_cpu.json").read_text())
    assert (contents["table"], contents["failures"]) == ("random", [])
    assert (
        "a random table was asked for" in contents["unavailable"]["the table of all-MiniLM-L6-v2, and text"]
    )
    rows = contents["rows"]
    cells = {(row["op"], row.get("ids"), row["N"]) for row in rows}
    assert cells == {("gather_decode", ids, N) for ids in ("zipf", "uniform") for N in (1, 300)} | {
        ("packed_head", None, N) for N in (1, 40)
    }
    for row in rows:
        assert (row["V"], row["H"], row["asked"]) == (1009, 96, 8)
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert row["bytes"] <= 1009 * 96 * 4 / 8
    for cell in cells:
        of_cell = {r["provider"]: r for r in rows if (r["op"], r.get("ids"), r["N"]) == cell}
        assert {"dense-fp32", "dense-bf16", "embkern"} <= of_cell.keys()
        assert of_cell["embkern"]["error"] < 1e-5
        assert of_cell["embkern"]["times_as_fast_as"].keys() == of_cell.keys() - {"embkern"}
    assert "tied head" in capsys.readouterr().out


def test_a_wrong_packed_lookup_is_not_timed(tmp_path, small, monkeypatch):
    right = gather_decode.gather_decode
    monkeypatch.setattr(
        gather_decode, "gather_decode", lambda *given, **named: right(*given, **named) * 1.001
    )
    selection = "--random --counts 40 --hidden --ids zipf --providers dense-fp32 embkern"
    with pytest.raises(SystemExit, match="1"):
        gather_decode.main([*QUICK, *selection.split(), "--results", str(tmp_path)])
    contents = json.loads((tmp_path / "gather_decode_cpu.json").read_text())
    assert {row["provider"] for row in contents["rows"]} == {"dense-fp32"}
    assert "relative error 1.00e-03" in contents["failures"][0]["error"]

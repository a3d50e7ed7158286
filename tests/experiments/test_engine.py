"""The cache of results: found by what they depend on, measured again when damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from embkern.experiments.engine import Result, key_of, read_result, write_result
from embkern.io.checked_json import to_checked_json


class Measured(Result):
    depends: dict[str, Any]
    value: float
    retry: bool = False
    note: str = ""

    def dependencies(self) -> dict[str, Any]:
        return self.depends

    def is_final(self) -> bool:
        return not self.retry


DEPENDS = {"model": "sha256:00", "ratios": [2.0, 3.5], "options": {"center": True}}


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "rows" / "one.json"
    write_result(path, Measured(depends=DEPENDS, value=0.25))
    return path


def test_a_result_is_read_back(path):
    assert read_result(path, Measured, DEPENDS) == Measured(depends=DEPENDS, value=0.25)
    assert [each.name for each in path.parent.iterdir()] == ["one.json"], "no temporary file remains"


def test_a_key_follows_from_the_dependencies_and_not_from_their_order():
    assert key_of(DEPENDS) == key_of(dict(reversed(DEPENDS.items())))
    assert len(key_of(DEPENDS)) == 12
    assert key_of({**DEPENDS, "model": "sha256:01"}) != key_of(DEPENDS)


def test_other_dependencies_no_file_and_an_unfinished_result_are_measured(path, caplog):
    assert read_result(path, Measured, {**DEPENDS, "ratios": [2.0]}) is None
    assert read_result(path.with_name("two.json"), Measured, DEPENDS) is None
    assert read_result(path.parent, Measured, DEPENDS) is None
    write_result(path, Measured(depends=DEPENDS, value=0.25, retry=True))
    assert read_result(path, Measured, DEPENDS) is None
    assert not caplog.text


def without_checksum(text: str) -> dict[str, Any]:
    content = json.loads(text)
    del content["checksum"]
    return content


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[" * 10**5,
        lambda text: text.replace("0.25", "0.75"),
        lambda text: '{"value": 0.25}',
        lambda text: to_checked_json({**without_checksum(text), "note": "\ud800"}),
    ],
    ids=["empty", "cut", "deep", "edited", "incomplete", "lone surrogate"],
)
def test_a_damaged_result_is_logged_and_measured_again(path, damage, caplog):
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    assert read_result(path, Measured, DEPENDS) is None
    assert f"{path} is damaged and is measured again" in caplog.text
    write_result(path, Measured(depends=DEPENDS, value=0.5))
    assert read_result(path, Measured, DEPENDS).value == 0.5

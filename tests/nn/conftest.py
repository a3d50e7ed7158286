"""Fixtures of the tests of modules."""

from __future__ import annotations

import pytest

from tests.nn.layers import FACTORS, PACKED


@pytest.fixture(params=[FACTORS, PACKED])
def kind(request) -> str:
    return request.param


@pytest.fixture
def in_pieces(monkeypatch) -> None:
    monkeypatch.setattr("embkern.nn.logits._BLOCK_ROWS", 5)  # of 13

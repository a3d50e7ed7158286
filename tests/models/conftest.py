"""Fixtures of the tests on models."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.example_tables import quantizing  # noqa: F401 (a fixture)


@pytest.fixture(params=["factors", "packed"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def saved(tmp_path, quantizing) -> Path:  # noqa: F811
    """Return a directory with a model over factors."""
    from tests.example_models import build
    from tests.models.compressing import compressed

    compressed(build("bert-backbone")).save_pretrained(tmp_path / "m")
    return tmp_path / "m"

"""Fixtures of the tests of benchmarks."""

import pytest

from benchmarks.training_loops import table_rows


@pytest.fixture(scope="module")
def tiny_rows():
    rows, reason = table_rows("tiny", "cpu")
    assert reason is None
    return rows

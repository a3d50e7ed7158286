"""Fixtures of the tests of exports."""

from tests.example_tables import quantizing  # noqa: F401 (a fixture)
from tests.models.conftest import kind  # noqa: F401 (a fixture)

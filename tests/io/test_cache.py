"""The cache directory follows the environment variables."""

from __future__ import annotations

import pytest

from embkern.io.cache import cache_directory


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"EMBKERN_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"EMBKERN_CACHE": "~/a"}, "/home/me/a"),
        ({"EMBKERN_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/embkern"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/embkern"),
        ({}, "/home/me/.cache/embkern"),
    ],
)
def test_the_cache_is_where_the_variables_say(monkeypatch, variables, expected):
    for name in ("EMBKERN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    assert cache_directory().as_posix() == expected

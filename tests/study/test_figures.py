"""Pictures of a study: what leaves a panel, and names that do not overlap."""

from __future__ import annotations

import re

import pytest

from tests.study import REQUIRED

for package in REQUIRED:
    pytest.importorskip(package)
from embkern.study.figures import Panel, draw, spread


def test_lines_out_of_range_leave_the_panel_and_empty_ones_are_not_drawn():
    lines = {"svd": [(2.0, 11.0), (3.0, 1e12)], "rtn": [(2.0, 12.0)], "none": [], "zero": [(2.0, 0.0)]}
    svg = draw([Panel("one", lines, level=10.0), Panel("two", {})], list(lines), [2, 3])
    named = set(re.findall("<!-- (.*) -->", svg))
    assert {"svd ↑", "rtn", "dense", "one", "two"} <= named
    assert not {"svd", "none", "zero"} & named
    assert "1e" not in " ".join(named)


def test_a_picture_does_not_depend_on_the_callers_matplotlib_settings():
    matplotlib = pytest.importorskip("matplotlib")
    panels = [Panel("one", {"svd": [(2.0, 11.0), (3.0, 12.0)]}, level=10.0)]
    expected = draw(panels, ["svd"], [2, 3])
    settings = {"figure.constrained_layout.use": True, "font.size": 20.0, "lines.linewidth": 9.0}
    with matplotlib.rc_context(settings):
        before = dict(matplotlib.rcParams)
        assert draw(panels, ["svd"], [2, 3]) == expected
        assert dict(matplotlib.rcParams) == before


def test_names_of_lines_are_moved_apart_as_little_as_possible():
    assert spread([0.0, 30.0], 10) == [0.0, 30.0]
    assert spread([5.0, 5.0], 10) == [0.0, 10.0]
    assert spread([0.0, 1.0, 2.0, 50.0], 10) == [-9.0, 1.0, 11.0, 50.0]

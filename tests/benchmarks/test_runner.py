"""The protocol that benchmarks share: limits of errors, selections, deadlines, failures."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from benchmarks.runner import Bench, Prepared, assert_within, option_parser, parse, relative_error, selected


@pytest.fixture
def options(tmp_path):
    given = ["--device", "cpu", "--cell-seconds", "0", "--results", str(tmp_path)]
    return parse(option_parser("some", None), given, ["a", "b"], seconds={"cpu": (2.0, 0.5)})


def test_an_error_over_its_limit_is_refused_by_name():
    assert assert_within([0.1, 0.2], [0.1, 0.3]) == 0.2
    with pytest.raises(AssertionError, match=r"^weights: relative error 2.00e-01, at most 1.00e-01"):
        assert_within([0.1, 0.2], [0.1, 0.1], ("losses", "weights"))


def test_the_error_of_nan_is_infinite():
    exact = torch.ones(3, dtype=torch.float64)
    assert relative_error(torch.tensor([1.0, 1.0, 2.0]), exact) == pytest.approx(3**-0.5)
    assert relative_error(torch.full((3,), torch.nan), exact) == float("inf")


def test_options_replace_entries_of_the_selections_that_have_them():
    given = argparse.Namespace(counts=[5], ranks=None)
    (chosen, replaced), (other, _) = selected(given, [dict(counts=[1, 2], ranks=[3]), dict(ranks=[4])])
    assert (chosen, replaced) == (dict(counts=[5], ranks=[3]), dict(counts=[5]))
    assert other == dict(ranks=[4])


def test_quick_runs_have_shorter_cells_and_limits(tmp_path):
    found = [
        parse(option_parser("some", None), ["--device", "cpu", *quick], [], seconds={"cpu": (2.0, 0.5)})
        for quick in ([], ["--quick"])
    ]
    assert [(each.cell_seconds, each.limit_seconds) for each in found] == [(2.0, 1440.0), (0.5, 170.0)]


def test_no_cell_is_started_after_the_deadline(options, capsys):
    bench = Bench("some", [], options)
    started = []
    for cell in bench.before_deadline([1, 2, 3], "cells"):
        started.append(cell)
        bench.deadline = 0.0
    assert started == [1]
    assert "--limit-seconds: 2 of 3 cells were not measured, from 2 on" in capsys.readouterr().out


def test_a_provider_that_fails_or_does_not_apply_is_not_timed(options):
    bench = Bench("some", ["--quick"], options)

    def prepare(name):
        if name == "inapplicable":
            return None
        assert name != "wrong", "relative error"
        return Prepared(lambda: 2.0, {"error": 0.0})

    measured = bench.measure("a cell", ["right", "wrong", "inapplicable"], prepare)
    assert measured.times == {"right": [2.0] * 5}
    assert measured.figures("right") == {"error": 0.0, "rounds": 5, "p50": 2.0, "p20": 2.0, "p80": 2.0}
    with pytest.raises(SystemExit):
        bench.finish()
    contents = json.loads((options.results / "some_cpu.json").read_text())
    assert contents["command"] == "python -m benchmarks some --quick"
    assert [failure["provider"] for failure in contents["failures"]] == ["wrong"]


def test_a_provider_that_is_unavailable_is_reported_once(options, capsys):
    bench = Bench("some", [], options)
    for _ in range(2):
        names = bench.available(["a", "b"], lambda name: "no compiler" if name == "b" else None)
    assert names == ["a"]
    assert bench.unavailable == {"b": "no compiler"}
    assert capsys.readouterr().out.count("without b: no compiler") == 1

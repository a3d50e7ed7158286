"""The verdict of a study: which method it names, and commands that make what was measured."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.study import REQUIRED

for package in REQUIRED:
    pytest.importorskip(package)
import embkern
from embkern.cli import main as cli
from embkern.models.report import read_report
from embkern.study import Row, Study, StudyOptions, verdicts_of
from embkern.study.spec import MethodSpec
from embkern.study.verdict import FLAGS, command_of

OPTIONS = StudyOptions.parse(
    model="model", output=Path("out"), ratios=[4, 8], methods=["svd", "allocate", "direction", "rtn"]
)


def row(measure, method, ratio, **result) -> Row:
    return Row(
        id=f"{measure}-{method}-{ratio}", measure=measure, method=method, ratio=ratio, depends={}, command="",
        result=result, seconds=0, environment={},
    )  # fmt: skip


def study_of(*rows: Row) -> Study:
    return Study(model="model", command="", options=OPTIONS, rows=list(rows), measured=0, seconds=0)


def tables(**errors: tuple[float, float]) -> list[Row]:
    return [
        row("table", method, ratio, weighted_direction_error=error, model_saved=0.25)
        for method, pair in errors.items()
        for ratio, error in zip((4.0, 8.0), pair, strict=True)
    ]


def test_what_the_model_does_comes_before_what_its_table_looks_like():
    rows = tables(svd=(0.1, 0.2), allocate=(0.2, 0.3), rtn=(0.3, 0.4))
    assert [(best.row.method, best.row.ratio) for best in verdicts_of(study_of(*rows))] == [
        ("svd", 4), ("svd", 8)
    ]  # fmt: skip
    sentences = [
        row("sentences", method, ratio, spearman=value)
        for method, ratio, value in (("svd", 4.0, 0.98), ("allocate", 4.0, 0.99), ("rtn", 4.0, 0.9))
    ]
    (best,) = verdicts_of(study_of(*rows, *sentences))
    assert (best.row.method, best.figures) == ("allocate", ("0.9900", "25.0%"))
    perplexity = [
        row("perplexity", "svd", 8.0, input_only={"perplexity": 9.0}, tied=None),
        row("perplexity", "allocate", 8.0, input_only={"perplexity": 8.0}, tied={"perplexity": 30.0}),
        row("perplexity", "direction", 8.0, input_only={"perplexity": 1.0}, tied={"perplexity": 20.0}),
        row("perplexity", "dense", None, perplexity=7.0),
    ]
    (best,) = verdicts_of(study_of(*rows, *sentences, *perplexity))
    assert best.row.method == "allocate", "direction has no table, so nothing that it saves is known"
    assert best.figures[0] == "30.00"


def test_without_a_result_there_is_no_verdict():
    assert verdicts_of(study_of()) == []


def test_the_report_opens_with_it(done):
    for page in (done.page, done.options.output / "report.md"):
        text = page.read_text(encoding="utf-8")
        assert text.index("Verdict") < text.index("The model")
    found = verdicts_of(done)
    assert [best.row.ratio for best in found] == done.options.ratios
    for best in found:
        assert best.command in (done.options.output / "report.md").read_text(encoding="utf-8")


def test_flags_are_those_of_the_command_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["embkern", "compress", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    shown = capsys.readouterr().out
    for flag in FLAGS:
        assert f"--{flag.replace('_', '-')}" in shown


@pytest.mark.parametrize("text", ["svd:center=true", "svd", "allocate:exponent=0.7", "allocate:tiers=3"])
def test_the_command_makes_the_table_that_was_measured(text, models, tmp_path, monkeypatch):
    options = StudyOptions.parse(
        model=str(models / "masked"), output=tmp_path / "study", ratios=[2], methods=[text]
    )
    (spec,) = options.specs()
    command = command_of(options, spec, 2.0)
    monkeypatch.chdir(tmp_path)
    if command.startswith("embkern compress"):
        monkeypatch.setattr("sys.argv", shlex.split(command))
        with pytest.raises(SystemExit, match="0"):
            cli.main()
    else:
        assert "tiers" in text, "options without a flag need Python"
        exec(command, {"embkern": embkern})
    (made,) = tmp_path.glob("*-2x")
    report = read_report(made)
    assert report.recipe.model_dump() == spec.recipe(2.0).model_dump()


def test_counts_and_calibration_are_named():
    options = StudyOptions.parse(
        model="m", output=Path("o"), methods=["allocate"], counts=Path("a b.json"), count_text=["x", "y"]
    )
    spec = MethodSpec.parse("allocate", 0)
    expected = (
        "embkern compress m --ratio 16 --method allocate --counts 'a b.json' --count-text x --count-text y "
        "--no-calibrate -o allocate-16x"
    )
    assert command_of(options, spec, 16.0, causal=True) == expected

"""The run of a study: its rows, which of them are measured again, and the command."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests.study import REQUIRED

for package in REQUIRED:
    pytest.importorskip(package)
from embkern import study
from embkern.evaluate.perplexity import perplexity
from embkern.io.checked_json import read_checked_json, to_checked_json
from embkern.methods import METHODS
from embkern.models.checkpoint import model_bytes
from embkern.models.loading import load_model
from embkern.study import Row, plans
from embkern.study.measures import MEASURES, Measure
from embkern.text.reading import read_texts
from tests.study.tiny_models import FEW, ODD, H, V, results, steady, tokenizer


def test_rows_agree_with_direct_measurements(models, done):
    dense = load_model(models / "masked")
    own = perplexity(dense, tokenizer(), read_texts(models / "text.txt"), progress=False)
    found = results(done.rows, "perplexity")
    assert found["dense", None]["perplexity"] == own.perplexity
    assert found["svd", 2.0]["tied"]["perplexity"] != found["svd", 2.0]["input_only"]["perplexity"]
    assert found["svd", 2.0]["tied"]["tokens"] == own.tokens
    for (method, ratio), row in results(done.rows, "table").items():
        name = method.partition(":")[0]
        assert row["ratio"] == row["table_bytes"] / row["compressed_bytes"] >= ratio
        assert row["model_bytes"] - row["compressed_model_bytes"] == V * H * 4 - row["compressed_bytes"]
        assert (row["rank"] is None) == (METHODS[name].sized_by == "ratio")
    near = results(done.rows, "neighbors")
    assert {len(row["words"]) for row in near.values()} == {6}
    assert all(word["kept"] == 6 for word in near["dense", None]["words"])
    assert len(results(done.rows, "lookup")) == len(results(done.rows, "sentences")) == 6
    heads = results(done.rows, "head")
    assert len(heads) == 6
    assert all(size["compressed_us"] > 0 for row in heads.values() for size in row["sizes"])


def test_rows_are_reproducible_for_a_seed_and_differ_for_another(models, done, tmp_path):
    text = models / "text.txt"
    asked = dict(FEW, text=text, dataset=str(text), words=[*ODD[:5], "red"])
    again = study.compare(models / "masked", output=tmp_path / "again", **asked)
    assert steady(again.rows) == steady(done.rows)
    other = study.compare(models / "masked", output=tmp_path / "again", **asked, seed=1)
    assert not {row.id for row in other.rows} & {row.id for row in done.rows}
    table = [results(each.rows, "table")["autoencoder:epochs=2", 2.0]["rmse"] for each in (done, other)]
    assert table[0] != table[1]


def test_only_new_and_damaged_rows_are_measured(models, tmp_path):
    asked = dict(output=tmp_path, progress=False, methods=["svd"])
    first = study.compare(models / "causal", ratios=[2], **asked)
    assert study.compare(models / "causal", ratios=[2], **asked).measured == 0
    more = study.compare(models / "causal", ratios=[2, 3], **asked)
    assert 0 < more.measured == len(more.rows) - len(first.rows)
    text = str(models / "text.txt")
    told = study.compare(models / "causal", ratios=[2, 3], dataset=text, **asked)
    assert told.measured == 3, "perplexity: of the dense model and at two ratios"
    damaged = tmp_path / "rows" / f"{first.rows[0].id}.json"
    whole = damaged.read_text()
    number = re.search(r"\d(?=\.\d+)", whole[whole.index('"result"') :])
    assert number is not None
    at = whole.index('"result"') + number.start()
    unprintable = to_checked_json({**read_checked_json(damaged), "command": "\ud800"})
    for content in ("{", "[" * 10**5, f"{whole[:at]}{9 - int(whole[at])}{whole[at + 1 :]}", unprintable):
        damaged.write_text(content)
        assert study.compare(models / "causal", ratios=[2], **asked).measured == 1
    assert study.compare(models / "causal", ratios=[2], overwrite=True, **asked).measured == len(first.rows)


def test_rows_whose_code_has_changed_are_measured_again(models, tmp_path, monkeypatch):
    options = dict(output=tmp_path, progress=False, ratios=[2], methods=["svd", "rtn"])
    first = study.compare(models / "causal", **options)
    of_svd = sum(row.method == "svd" for row in first.rows)
    real, changed = plans.method_code, "sha256:changed"
    with monkeypatch.context() as patch:
        patch.setattr(plans, "method_code", lambda name: changed if name == "svd" else real(name))
        assert study.compare(models / "causal", **options).measured == of_svd
    with monkeypatch.context() as patch:
        patch.setattr(plans, "frequencies_code", lambda: changed)
        assert study.compare(models / "causal", **options).measured == len(first.rows)
    code, table = Measure.code, MEASURES["table"]
    with monkeypatch.context() as patch:
        patch.setattr(Measure, "code", lambda self: changed if self is table else code(self))
        assert study.compare(models / "causal", **options).measured == 2, "measure_table of both methods"
    assert study.compare(models / "causal", **options).measured == 0, "the rows of the former code remain"


@pytest.mark.slow
def test_a_killed_study_resumes(models, tmp_path):
    arguments = [models / "masked", "--ratios", 2, 3, 4, "--methods", "svd", "allocate", "direction"]
    command = [sys.executable, "-m", "embkern", "compare", *map(str, arguments), "-o", str(tmp_path)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE)
    started = time.monotonic()
    while len(kept := list((tmp_path / "rows").glob("*.json"))) < 5:
        assert running.poll() is None, "it ended before it could be killed"
        assert time.monotonic() - started < 100
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert not (tmp_path / "report.html").exists()
    before = {path: path.stat().st_mtime_ns for path in kept}
    rest = study.compare(
        models / "masked", output=tmp_path, ratios=[2, 3, 4], methods=["svd", "allocate", "direction"]
    )
    assert rest.measured <= len(rest.rows) - len(before)
    assert all(path.stat().st_mtime_ns == modified for path, modified in before.items())
    assert len(rest.rows) == 38
    assert rest.page.exists()


def test_unreachable_ratios_and_missing_packages_are_rows_with_a_reason(models, tmp_path, monkeypatch):
    def lacks(*_: object, **__: object) -> None:
        raise ImportError("product_quantization needs faiss")

    lacking = METHODS["product_quantization"]._replace(compress=lacks)
    monkeypatch.setitem(METHODS, "product_quantization", lacking)
    asked = dict(output=tmp_path, ratios=[2, 500], methods=["svd", "product_quantization"], progress=False)
    done = study.compare(models / "encoder", **asked)
    reasons = {(row.method, row.ratio): row.reason for row in done.rows if row.reason}
    assert "no room for rank 1" in reasons["svd", 500.0]
    assert reasons["product_quantization", 2.0] == "product_quantization needs faiss"
    assert "no room for rank 1" in (tmp_path / "report.md").read_text(encoding="utf-8")
    tried = study.compare(models / "encoder", **asked).measured
    assert tried == sum(row.method == "product_quantization" for row in done.rows), (
        "rows of a missing package are tried again"
    )


def test_an_encoder_has_no_perplexity_and_every_method_a_model(models, tmp_path):
    text = models / "text.txt"
    done = study.compare(
        models / "encoder", output=tmp_path, ratios=[2], methods=["svd", "rtn"], text=text, dataset=str(text),
        keep_models=True, progress=False,
    )  # fmt: skip
    (row,) = [row for row in done.rows if row.measure == "perplexity"]
    assert "no language-model head" in row.reason
    measured = {"table", "neighbors", "lookup", "sentences", "saved"}
    for method in ("svd", "rtn"):
        assert {row.measure for row in done.rows if row.method == method and row.result} == measured
        loaded = load_model(tmp_path / "models" / f"{method}-2x")
        assert model_bytes(loaded) == results(done.rows, "table")[method, 2.0]["compressed_model_bytes"]
    assert "## Perplexity" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_tied_head_that_cannot_decode_is_a_reason(models, tmp_path):
    done = study.compare(
        models / "masked", output=tmp_path, ratios=[2], methods=["autoencoder:epochs=1,activation=elu"],
        dataset=str(models / "text.txt"), keep_models=True, progress=False,
    )  # fmt: skip
    refused = [row for row in done.rows if row.reason]
    assert [row.measure for row in refused] == ["head", "saved"]
    assert all("a tied head cannot decode through activation" in row.reason for row in refused)
    found = done.rows[-2].result
    assert found["input_only"]["tokens"] > 0
    assert found["tied"] is None
    assert results(done.rows, "table")[refused[0].method, 2.0]["compressed_model_bytes"] is None


# ---- the command -----------------------------------------------------------------------------------------


def command_line(monkeypatch, capsys, *arguments: object) -> str:
    from embkern.cli import main as cli

    monkeypatch.setattr(sys, "argv", ["embkern", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stopped:
        if stopped.code:
            return capsys.readouterr().err.splitlines()[-1]  # transformers may show a bar before
    return capsys.readouterr().out


def test_a_rows_command_measures_it_again(models, tmp_path, monkeypatch, capsys):
    arguments = ["compare", models / "causal", "--ratios", 2, 3, "--methods", "svd", "svd:center=true"]
    shown = command_line(monkeypatch, capsys, *arguments, "--words", "red", "a|b", "-o", tmp_path, "--json")
    rows = [Row.model_validate(row) for row in json.loads(shown)["rows"]]
    row = next(row for row in rows if row.method == "svd:center=true" and row.ratio == 3)
    kept = {path: path.stat().st_ino for path in tmp_path.glob("rows/*.json")}
    program, *again = shlex.split(row.command)
    assert program == "embkern"
    assert again[-2:] == ["--row", row.id]
    measured = Row.model_validate_json(command_line(monkeypatch, capsys, *again))
    assert steady([measured]) == steady([row])
    changed = {path.stem for path, inode in kept.items() if path.stat().st_ino != inode}
    assert changed == {row.id}
    assert "row: 'abc' is not one of" in command_line(monkeypatch, capsys, *again[:-1], "abc")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "svd", "magic"], "methods: expected NAME .* got 'magic'"),
        (["--methods", "svd:center"], "methods: expected NAME .* got 'svd:center'"),
        (["--methods", "svd:centre=true"], "svd: centre: .*known: .*center"),
        (["--ratios", "5", "0.5"], "ratio: expected at least 1 .*, got 0.5"),
        (
            ["--words", "red", "purple"],
            r"words: expected words that are one token, got 'purple', read as \[UNK\]",
        ),
        (["--max-tokens", "0"], "compare: max_tokens: .* got 0"),
        (["--device", "abacus"], "device: expected one that is there, got 'abacus' "),
        (["--dataset", "./none.txt"], "text: expected a file, a directory or a data set, found none"),
        (["--dataset", "{models}/empty.txt"], "text: expected some text, found none in .*empty.txt"),
        (["--dataset", "{models}/binary.txt"], "text: .*binary.txt is not UTF-8 text"),
        (["--text", "./none.txt"], "text: expected a text file, found none"),
        (["-o", "{models}"], "output: .* is, or holds, the model to read"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    models, tmp_path, monkeypatch, capsys, arguments, message
):
    filled = [each.format(models=models) for each in arguments]
    shown = command_line(monkeypatch, capsys, "compare", models / "masked", "-o", tmp_path / "out", *filled)
    assert re.search(f"^embkern: .*{message}", shown), shown
    assert not (tmp_path / "out" / "report.md").exists()

"""Perplexity of saved models beside the dense one, and the command."""

from __future__ import annotations

import json
import math
import sys
import types

import pytest
import torch

T = pytest.importorskip("transformers")
import embkern
from embkern.evaluate import measure_perplexity
from tests.evaluate.language_models import TEXTS, sharp


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("perplexity")
    sharp("bert").save_pretrained(root / "dense")
    tokenizer.save_pretrained(root / "dense")
    for name, head in (("svd", "factorized"), ("input", "dense")):
        embkern.compress(root / "dense", method="svd", rank=9, lm_head=head, output=root / name)
    (root / "text.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    return root


def test_saved_models_beside_the_dense_one(saved, tokenizer):
    names = [str(saved / name) for name in ("svd", "input")]
    run = measure_perplexity(names, saved / "text.txt", against=str(saved / "dense"), max_length=48)
    both, input_only = run.tables
    assert input_only.input_only == both.input_only
    assert input_only.tied is None, "saved with a dense head"
    alone = [measure_perplexity([name], saved / "text.txt", max_length=48) for name in names]
    assert both.tied.loss == pytest.approx(alone[0].model.loss, rel=1e-5)
    assert both.input_only.loss == pytest.approx(alone[1].model.loss, rel=1e-5)
    assert run.nbytes == {str(saved / "dense"): 101 * 32 * 4, **dict.fromkeys(names, (101 + 32) * 9 * 4)}
    low = measure_perplexity(
        names[:1], saved / "text.txt", against=str(saved / "dense"), max_length=48, dtype="bfloat16"
    )
    assert low.dtype == "bfloat16"
    assert low.tables[0].tied.tokens == both.tied.tokens
    assert low.tables[0].tied.loss == pytest.approx(both.tied.loss, rel=2e-3)  # bfloat16 rounds by 2^-9


def test_models_that_do_not_belong_together_are_refused(saved, tmp_path):
    dense, text = str(saved / "dense"), saved / "text.txt"
    with pytest.raises(ValueError, match="against: expected the dense model with 2 models, got none"):
        measure_perplexity([dense, dense], text)
    with pytest.raises(
        ValueError, match="model: expected one compressed by embkern with against, got a dens"
    ):
        measure_perplexity([dense], text, against=dense)
    trained = T.AutoModelForMaskedLM.from_pretrained(dense)
    with torch.no_grad():
        trained.bert.encoder.layer[0].output.dense.bias.add_(1)
    trained.save_pretrained(tmp_path / "trained")
    with pytest.raises(
        ValueError, match="1 of its other tensors differ, such as bert.encoder.layer.0.output"
    ):
        measure_perplexity([str(saved / "svd")], text, against=str(tmp_path / "trained"))
    with pytest.raises(ValueError, match=r"device: expected one that is there, got 'cuda:99' \("):
        measure_perplexity([dense], text, device="cuda:99")
    with pytest.raises(ValueError, match="dtype: expected a floating-point dtype of torch, got 'int8'"):
        measure_perplexity([dense], text, dtype="int8")


# ---- the command -----------------------------------------------------------------------------------------


@pytest.fixture
def run(saved, monkeypatch, run_command):
    """Run the command in the directory of the models."""
    monkeypatch.chdir(saved)
    return lambda *arguments: run_command("perplexity", *arguments)


def test_the_command_writes_figures_with_their_settings(run):
    arguments = ["svd", "--against", "dense", "--dataset", "text.txt", "--max-tokens", "400", "--seed", "3"]
    got = json.loads(run(*arguments, "--json").out)
    assert got["command"] == " ".join(["embkern evaluate perplexity", *arguments, "--json"])
    assert (got["source"], got["dataset"], got["tables"][0]["name"]) == ("dense", "text.txt", "svd")
    assert (got["settings"]["seed"], got["settings"]["max_length"]) == (3, 64)
    assert got["model"]["perplexity"] == pytest.approx(math.exp(got["model"]["loss"]))
    assert got["tables"][0]["tied"]["tokens"] == got["model"]["tokens"] < got["read"]


def test_the_command_prints_both_figures(run):
    shown = run("svd", "--against", "dense", "--dataset", "text.txt", "--masking", "mask").out
    figures = measure_perplexity(["svd"], "text.txt", against="dense", masking="mask")
    for figure in (figures.model, figures.tables[0].input_only, figures.tables[0].tied):
        assert f"{figure.perplexity:.2f}" in shown
    assert "input only" in shown
    assert "tied head" in shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "text: expected some text, found none in"),
        (b"\x00\x01\x02", "is not UTF-8 text"),
        (b"\xff\xfe", "errors='replace' (--errors replace) reads it"),
    ],
)
def test_files_without_text_are_refused(content, message, saved, tmp_path):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        measure_perplexity([str(saved / "dense")], tmp_path / "t.txt")


@pytest.mark.parametrize("size", [1, 100_000])
def test_a_file_of_one_line(size, saved, tmp_path):
    (tmp_path / "t.txt").write_text("the cat " * size, encoding="utf-8")
    got = measure_perplexity([str(saved / "dense")], tmp_path / "t.txt", max_tokens=2000)
    assert abs(got.model.tokens - 0.15 * got.read) <= max(0.5, 0.01 * got.read)
    assert got.read < 2100


def test_a_hub_that_cannot_be_reached_is_one_line_on_stderr(run, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    done = run("dense", "--dataset", "some/texts::test")
    last = done.err.splitlines()[-1]
    assert done.code == 1
    assert last.startswith(
        "embkern: text: 'some/texts::test' is neither a file nor a data set that the hub provides"
    )
    assert last.endswith("no route")

"""``embkern calibrate``."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

pytest.importorskip("transformers")

import embkern
from embkern.cli import main as cli
from embkern.methods.calibration import Calibration
from embkern.models.calibrate import on_samples, passes, sums
from embkern.models.calibrate.on_samples import self_calibrate_holding_out
from tests.example_models import build
from tests.models.calibrating import distinct_words, stopping_after, tokenizer


@pytest.fixture
def saved(tmp_path):
    build("gpt2").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(distinct_words(seed) for seed in range(3)))
    return tmp_path / "model"


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["embkern", "calibrate", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return done.value.code, *capsys.readouterr()

    return run


def test_calibrate_on_text(saved, tmp_path, run):
    text, out = tmp_path / "text.txt", tmp_path / "c.safetensors"
    arguments = (saved, "--text", text, "-o", out, "--tokens", 100, "--length", 20)
    code, printed, errors = run(*arguments, "--json")
    assert code == 0
    assert "calibrate" not in errors, "no progress bar when piped"
    summary, found = json.loads(printed), Calibration.load(out)
    expected = embkern.calibrate(
        build("gpt2"), tokenizer(), text.read_text().split("\n"), tokens=100, length=20
    )
    assert torch.equal(found.input_moment, expected.input_moment)
    assert torch.equal(found.head_moment, expected.head_moment)
    assert found.facts == expected.facts
    assert (summary["tokens"], summary["scored"], summary["distinct"]) == (
        100,
        100,
        int((expected.inputs > 0).sum()),
    )
    assert summary["facts"]["architecture"] == "GPT2LMHeadModel"
    assert 0 < summary["head_share"] <= 1
    assert not list(tmp_path.glob("*.partial"))

    code, _, errors = run(*arguments)
    assert code == 1
    assert "c.safetensors exists" in errors
    before = out.read_bytes()
    code, printed, _ = run(*arguments, "--overwrite")
    assert code == 0
    assert "GPT2LMHeadModel (causal)" in printed
    assert "100 (text)" in printed
    assert out.read_bytes() == before, "the same inputs give the same bytes"


def test_calibrate_on_samples_and_add(saved, tmp_path, run, monkeypatch):
    first, second, both = (tmp_path / name for name in ("a", "b", "c"))
    size = ("--tokens", 40, "--length", 10)
    assert run(saved, "--self", "-o", first, *size)[0] == 0
    assert run(saved, "--text", tmp_path / "text.txt", "-o", second, *size, "--seed", 1)[0] == 0
    code, printed, _ = run(saved, "--add", first, second, "-o", both)
    assert code == 0
    assert "80 (samples of the model itself, text)" in printed
    one, other, total = map(Calibration.load, (first, second, both))
    assert torch.equal(total.input_moment, one.input_moment + other.input_moment)
    code, _, errors = run(saved, "--add", first, "--self", "-o", first, "--overwrite", *size)
    assert code == 1
    assert "got twice one over 40 tokens of samples with seed 0" in errors
    found = self_calibrate_holding_out(build("gpt2"), 0, windows=4, length=10)[0]
    assert torch.equal(found.input_moment, Calibration.load(first).input_moment)
    with monkeypatch.context() as patch:
        patch.setattr(on_samples, "run_pass", None)  # before the pass
        assert "got twice" in run(saved, "--add", first, "--self", "-o", tmp_path / "d", *size)[2]
    assert run(saved, "--add", first, "--self", "--seed", 1, "-o", first, "--overwrite", *size)[0] == 0
    assert Calibration.load(first).tokens == 80


def test_an_interrupted_run_is_resumed_by_the_same_command(saved, tmp_path, run, monkeypatch):
    out = tmp_path / "c"
    arguments = (saved, "--text", tmp_path / "text.txt", "-o", out, "--tokens", 100, "--length", 10)
    assert run(*arguments)[0] == 0
    whole = out.read_bytes()
    out.unlink()
    monkeypatch.setattr(passes, "LOGIT_BYTES", 1)
    monkeypatch.setattr(sums, "SAVED_EVERY", 0.0)
    assert run(*arguments)[0] == 0
    alone = out.read_bytes()
    out.unlink()
    with stopping_after(monkeypatch, 4, KeyboardInterrupt):
        code, _, errors = run(*arguments)
    assert code != 0
    assert "the same command resumes from" in errors
    assert not out.exists()
    assert (tmp_path / "c.partial").exists()
    assert run(*arguments)[0] == 0
    assert out.read_bytes() == alone
    assert not (tmp_path / "c.partial").exists()
    assert len(whole) == len(alone)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{saved}", "-o", "{out}"], "text: expected a source of text, samples .*--self.*, or files to add"),
        (["{saved}", "-o", "{out}", "--self", "--text", "x"], "text: expected none with samples"),
        (["{saved}", "-o", "{out}", "--text", "./none.txt"], "text: expected a file, .* none at ./none.txt"),
        (["{saved}/none", "-o", "{out}", "--self"], "model: expected a directory .* none at .*/none"),
        (["{saved}", "-o", "{out}/no/c", "--self"], "output: expected a file in a directory that exists"),
        (["{saved}", "-o", "{text}", "--text", "{text}", "--overwrite"], "output: .* the text to read"),
        (["{saved}", "-o", "{out}", "--text", "{text}", "--tokens", "0"], "tokens: expected at least 1"),
        (["{saved}", "-o", "{out}", "--add", "{text}"], "add: .*text.txt is not a readable safetensors file"),
        (
            ["{saved}", "-o", "{out}", "--add", "{out}.none"],
            "add: expected a file of a calibration, found none",
        ),
    ],
)
def test_errors_name_the_argument(saved, tmp_path, run, arguments, message):
    names = {"saved": saved, "out": tmp_path / "out", "text": tmp_path / "text.txt"}
    code, _, errors = run(*(each.format(**names) for each in arguments))
    assert code == 1
    assert re.search(f"^embkern: {message}", errors, re.MULTILINE), errors
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(saved, tmp_path, run):
    assert run(saved, "--self", "-o", tmp_path / "a", "--tokens", 20, "--length", 10)[0] == 0
    changed = build("gpt2")
    with torch.no_grad():
        changed.transformer.ln_f.weight.mul_(2)
    changed.save_pretrained(tmp_path / "changed")
    code, _, errors = run(tmp_path / "changed", "--add", tmp_path / "a", "-o", tmp_path / "b")
    assert code == 0
    assert re.search("^embkern: warning: calibration: the model's weights have changed", errors, re.MULTILINE)
    assert "UserWarning" not in errors


def test_a_calibration_of_another_model_is_not_added(saved, tmp_path, run):
    assert run(saved, "--self", "-o", tmp_path / "a", "--tokens", 20, "--length", 10)[0] == 0
    build("llama-tied").save_pretrained(tmp_path / "other")
    code, _, errors = run(tmp_path / "other", "--add", tmp_path / "a", "-o", tmp_path / "b")
    assert code == 1
    assert "expected one of this model, got another model's" in errors
    code, _, errors = run(tmp_path / "other", "--text", tmp_path / "text.txt", "-o", tmp_path / "b")
    assert "tokenizer: expected a directory with one" in errors
    assert run(tmp_path / "other", "--self", "-o", tmp_path / "b", "--tokens", 20, "--length", 10)[0] == 0

"""Files of Fisher weights, their command, and the methods that take them, in a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

import embkern
from embkern.cli import main as cli
from embkern.models.fisher_file import FORMAT, load_fisher
from embkern.models.loading import load_model
from tests.example_models import H, V, build
from tests.models.calibrating import distinct_words, tokenizer

DATA = Path(__file__).parents[1] / "data"
IDS = torch.arange(V).unsqueeze(0)[:, :20]


@pytest.fixture
def saved(tmp_path):
    build("gpt2").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(distinct_words(seed) for seed in range(3)))
    return tmp_path / "model"


@pytest.fixture
def weights(saved):
    """A file of weights of the saved model."""
    path = saved.parent / "weights.safetensors"
    embkern.fisher_files(saved, [saved.parent / "text.txt"], path, length=20, progress=False)
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["embkern", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return done.value.code, *capsys.readouterr()

    return run


def test_the_command_measures_what_the_function_does(saved, tmp_path, run):
    text, out = tmp_path / "text.txt", tmp_path / "f.safetensors"
    arguments = ("fisher", saved, "--text", text, "-o", out, "--length", 20, "--head")
    code, printed, errors = run(*arguments, "--json")
    assert code == 0, errors
    lines = text.read_text().split("\n")
    expected = embkern.fisher_weights(build("gpt2"), tokenizer(), lines, head=True, max_length=20)
    assert torch.equal(load_fisher(out), expected)
    assert json.loads(printed) == {
        "num_embeddings": V, "embedding_dim": H, "rows_with_weight": V, "head": True
    }  # fmt: skip
    code, _, errors = run(*arguments)
    assert (code, "f.safetensors exists" in errors) == (1, True)
    code, printed, _ = run(*arguments, "--overwrite")
    assert code == 0
    assert "of the lookups and the tied head" in printed
    code, _, errors = run("fisher", saved, "--text", text, "-o", text)
    assert (code, "is the text to read" in errors) == (1, True)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fwsvd", {}),
        ("tfwsvd", {"adam_steps": 20, "sgd_steps": 5}),
        ("nonlinear_autoencoder", {"weights": "fisher", "epochs": 2}),
        ("nonlinear_autoencoder", {"weights": "fisher", "epochs": 1, "norms": "none"}),
        ("nonlinear_autoencoder", {"norms": "fitted", "epochs": 1}),
    ],
)
def test_a_model_runs_saves_and_loads_with_each_method(saved, weights, tmp_path, method, options):
    model = load_model(saved)
    plain = embkern.compress(load_model(saved), method=method, ratio=2, fisher=weights, **options)
    report = embkern.compress(
        model, method=method, ratio=2, fisher=load_fisher(weights), output=tmp_path / "out", **options
    )
    assert report.ratio >= 2
    again = load_model(tmp_path / "out")
    with torch.no_grad():
        expected = model(IDS).logits
        assert torch.equal(again(IDS).logits, expected)
        assert torch.equal(plain.model(IDS).logits, expected), "a file and a tensor give the same"
        assert bool(torch.isfinite(expected).all())
    if options.get("weights") == "fisher" or method == "tfwsvd":
        other = torch.rand(V, H).square()
        changed = embkern.compress(load_model(saved), method=method, ratio=2, fisher=other, **options)
        assert not torch.equal(changed.model(IDS).logits, expected), "the weights count"


def test_a_command_takes_the_file(saved, weights, tmp_path, run):
    out = tmp_path / "small"
    arguments = (saved, "-o", out, "--ratio", 2, "--method", "tfwsvd", "--option", "adam_steps=5")
    code, _, errors = run("compress", *arguments, "--fisher", weights)
    assert code == 0, errors
    assert load_model(out).config.quantization_config.recipe.method == "tfwsvd"
    code, _, errors = run("compress", *arguments, "--overwrite")
    assert (code, "fisher: method 'tfwsvd' expected weights (101, 32), got none" in errors) == (1, True)


def test_weights_are_refused_where_they_cannot_be_used(saved, weights):
    with pytest.raises(
        ValueError, match="fisher: expected with method fwsvd, .*tfwsvd only, got method 'svd'"
    ):
        embkern.compress(saved, method="svd", ratio=2, fisher=weights)
    with pytest.raises(ValueError, match="fisher: expected the input table only, got transformer.wpe"):
        embkern.compress(saved, method="fwsvd", ratio=2, fisher=weights, tables=["transformer.wpe"])
    with pytest.raises(ValueError, match=r"fisher: expected shape \(101, 32\) .* got \(7, 32\)"):
        embkern.compress(saved, method="fwsvd", ratio=2, fisher=torch.rand(7, H))
    with pytest.raises(FileNotFoundError, match="expected a file of Fisher weights, found none"):
        embkern.compress(saved, method="fwsvd", ratio=2, fisher="nowhere.safetensors")


def test_a_study_compares_methods_with_fisher_weights(saved, weights, tmp_path):
    for package in ("jinja2", "matplotlib"):
        pytest.importorskip(package)
    from embkern import study

    methods = ["svd", "fwsvd", "tfwsvd:adam_steps=5,sgd_steps=2"]
    done = study.compare(
        saved, output=tmp_path / "study", ratios=[2], methods=methods, fisher=weights, progress=False
    )
    tables = {row.method: row for row in done.rows if row.measure == "table" and row.ratio}
    assert set(tables) == set(methods)
    assert all(row.result for row in tables.values())
    assert "fisher" not in tables["svd"].depends
    assert f"--fisher {weights}" in done.command
    other = weights.parent / "other.safetensors"
    facts = {"tokens": None, "head": False, "max_length": 20, "seed": 0}
    FORMAT.save(other, {"weights": torch.rand(V, H)}, facts=facts)
    again = study.compare(
        saved, output=tmp_path / "study", ratios=[2], methods=methods, fisher=other, progress=False
    )
    ids = {row.method: row.id for row in again.rows if row.measure == "table" and row.ratio}
    assert {name for name, row in tables.items() if row.id != ids[name]} == set(methods[1:])
    without = study.compare(saved, output=tmp_path / "none", ratios=[2], methods=["fwsvd"], progress=False)
    reasons = {row.reason for row in without.rows if row.method == "fwsvd"}
    assert any("expected weights (101, 32)" in reason for reason in reasons if reason)


def test_a_file_of_the_first_version_is_read():
    expected = torch.arange(12, dtype=torch.float32).view(4, 3) / 8
    assert torch.equal(load_fisher(DATA / "fisher-1.safetensors"), expected)


def test_damaged_files_are_refused(weights, tmp_path):
    tensors = load_file(weights)
    save_file(tensors, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="expected format 'embkern.fisher/1', got None"):
        load_fisher(tmp_path / "plain.safetensors")
    FORMAT.save(tmp_path / "half.safetensors", {"weights": tensors["weights"].half()}, facts={})
    with pytest.raises(ValueError, match=r"weights: expected \(V, H\) in fp32"):
        load_fisher(tmp_path / "half.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    (tmp_path / "changed.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="weights was changed after it was saved"):
        load_fisher(tmp_path / "changed.safetensors")

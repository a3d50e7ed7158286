"""``prune`` of whole models: nothing changes for the corpus, and tokens outside get what was asked for."""

from __future__ import annotations

import json

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")

import embkern
from embkern.cli import main as cli
from tests.example_models import V, build, word_tokenizer
from tests.models.compressing import reload

CORPUS = "red blue\nblue\n"
SPECIAL = {0, 1, 2, 3}  # of the tokenizer: [PAD] and [UNK]; of the config: 0, 1 and 2
KEPT = SPECIAL | {4, 6}


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(CORPUS)
    return path


@pytest.mark.parametrize("unknown", ["mean", "nearest", "error"])
@pytest.mark.parametrize("name", ["bert", "llama-tied"])
@torch.no_grad()
def test_nothing_changes_for_the_corpus(tmp_path, corpus, name, unknown):
    dense, model = build(name), build(name)
    settings = {"count_text": corpus, "tokenizer": word_tokenizer(), "unknown": unknown}
    report = embkern.compress(model, method="prune", **settings)
    assert report.facts == {"kept": len(KEPT), "unknown": unknown}
    table = model.get_input_embeddings().table
    assert table.kept_ids.tolist() == sorted(KEPT)
    assert report.compressed_bytes == sum(report.parts.values()) == table.nbytes
    ids = torch.tensor([[4, 6, 0], [6, 1, 2]])
    model = reload(model, tmp_path / "small")
    before, after = (each(ids, output_hidden_states=True) for each in (dense, model))
    assert torch.equal(after.hidden_states[0], before.hidden_states[0])
    assert torch.equal(after.hidden_states[-1], before.hidden_states[-1])
    kept = sorted(KEPT)
    assert_close(after.logits[..., kept], before.logits[..., kept], atol=1e-6, rtol=1e-5)
    others = torch.tensor([[5, 50, V - 1]])
    if unknown == "error":
        with pytest.raises(IndexError, match=r"tokens that were kept \(unknown='error'\), got 5"):
            model(others)
        if name == "llama-tied":
            assert set(model.generate(ids[:1], max_new_tokens=4, do_sample=True).flatten().tolist()) <= KEPT
    else:
        assert torch.isfinite(model(others).logits).all()


def test_a_ratio_keeps_the_most_frequent_tokens():
    counts = torch.zeros(V)
    counts[[7, 70, 9]] = torch.tensor([5.0, 9.0, 4.0])
    model = build("gpt2")
    embkern.compress(model, method="prune", ratio=25, counts=counts)
    assert model.get_input_embeddings().table.kept_ids.tolist() == [7, 70]


def test_without_a_text_or_a_ratio_it_is_refused():
    with pytest.raises(ValueError, match="prune: expected counts of text .*, got neither"):
        embkern.compress(build("bert"), method="prune")
    with pytest.raises(ValueError, match="expected exactly one of ratio and rank"):
        embkern.compress(build("bert"), method="rtn")


def test_the_command_line_prunes_and_takes_any_option(tmp_path, corpus, monkeypatch, capsys):
    dense = tmp_path / "dense"
    build("bert").save_pretrained(dense)
    word_tokenizer().save_pretrained(dense)

    def run(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["embkern", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        shown = capsys.readouterr()
        return shown.out if not stopped.value.code else shown.err.splitlines()[-1]

    command = ["compress", dense, "-o", tmp_path / "pruned", "--method", "prune", "--count-text", corpus]
    report = json.loads(run(*command, "--unknown", "nearest", "--json"))
    assert report["facts"] == {"kept": len(KEPT), "unknown": "nearest"}
    assert set(report["parts"]) == {"kept_rows", "kept_ids", "nearest_kept"}
    summary = json.loads(run("inspect", tmp_path / "pruned", "--json"))
    assert (summary["kind"], summary["parts"]) == ("pruned", report["parts"])
    assert "pruned" in run("inspect", tmp_path / "pruned")
    command = ["compress", dense, "-o", tmp_path / "four", "--method", "rtn", "--ratio", 4]
    report = json.loads(run(*command, "--option", "bits=4", "--option", "group=8", "--json"))
    assert report["facts"] == {"bits": 4, "group": 8}
    again = [*command, "--overwrite"]
    assert "option: expected NAME=VALUE, got 'bits'" in run(*again, "--option", "bits")
    assert "rtn: bit: Extra inputs are not permitted" in run(*again, "--option", "bit=4")

"""KL divergence from the dense model: its definition, exact zeros, and what it does not depend on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

T = pytest.importorskip("transformers")
import embkern
from embkern.evaluate import divergence, evaluate_perplexity, language_model, measure_perplexity
from embkern.fidelity.divergence import DenseBlock, Divergences, kl_divergence
from embkern.models.table_swap import TableSwap
from tests.evaluate.language_models import SIZES, TEXTS, VOCABULARY, sharp
from tests.example_models import build
from tests.example_tables import packed_of


def disturbed(model) -> torch.Tensor:
    """Return the model's table with noise of a tenth of its size."""
    table = model.get_input_embeddings().weight.detach()
    return table + 0.1 * table.std() * torch.randn(table.shape, generator=torch.Generator().manual_seed(0))


# ---- the definition --------------------------------------------------------------------------------------


def test_the_divergence_is_that_of_torch():
    logits = torch.randn(2, 37, 501, generator=torch.Generator().manual_seed(0)) * 4
    dense, other = logits.log_softmax(-1)
    exact = F.kl_div(*logits.flip(0).double().log_softmax(-1), log_target=True, reduction="none").sum(-1)
    got = kl_divergence(dense, dense.exp(), other.clone())
    # A log-probability below 64 in fp32 errs by some units of 2^-19; the probabilities sum up to 1.
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=4 * 2.0**-19)
    assert torch.equal(kl_divergence(dense, dense.exp(), dense.clone()), torch.zeros(37)), "no rounding error"


def test_a_token_that_both_exclude_adds_nothing():
    dense = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]).log()
    other = torch.tensor([[0.25, 0.75, 0.0], [0.25, 0.25, 0.5], [0.0, 0.5, 0.5]]).log()
    got = kl_divergence(dense, dense.exp(), other.clone())
    halves = [0.5 * np.log(2) + 0.5 * np.log(2 / 3), np.log(2), np.inf]
    assert got.tolist() == pytest.approx(halves, rel=1e-6)


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_mean_and_percentile_are_those_of_torch(count):
    logits = torch.randn(2, count, 9, generator=torch.Generator().manual_seed(count))
    dense, other = logits.log_softmax(-1)
    values = kl_divergence(dense, dense.exp(), other.clone())
    collected = Divergences()
    for expected, block in zip(dense.split(13), other.split(13), strict=True):
        collected.add(DenseBlock.of(expected), block.clone())
    got = collected.total()
    assert collected.tokens == count
    assert got.mean == pytest.approx(float(values.double().mean()), rel=1e-6)
    assert got.p99 == pytest.approx(float(values.quantile(0.99)), rel=1e-6)
    assert got.top1 == pytest.approx(float((dense.argmax(-1) == other.argmax(-1)).double().mean()))
    assert Divergences().total() is None


# ---- models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_figures_are_those_of_the_models_logits(name, tokenizer):
    model = sharp(name)
    table, length = disturbed(model), 32
    ids = tokenizer("\n".join(TEXTS), return_tensors="pt").input_ids[:, :-1]
    swap = TableSwap(model, table)

    @torch.no_grad()
    def predictions() -> torch.Tensor:
        parts = [
            model(ids[:, start : start + length]).logits[0, :-1] for start in range(0, ids.shape[1], length)
        ]
        return torch.cat(parts).double().log_softmax(-1)

    dense = predictions()
    with swap.inputs():
        input_only = predictions()
    with swap.inputs_and_heads():
        tied = predictions()
    report = evaluate_perplexity(model, tokenizer, TEXTS, {"noise": table}, max_length=length, stride=length)
    assert report.model.divergence is None
    for got, other in ((report.tables[0].input_only, input_only), (report.tables[0].tied, tied)):
        each = F.kl_div(other, dense, log_target=True, reduction="none").sum(-1)
        assert got.tokens == len(each)
        assert got.divergence.mean == pytest.approx(float(each.mean()), rel=1e-3)
        assert got.divergence.p99 == pytest.approx(float(each.quantile(0.99)), rel=1e-3)
        same = float((other.argmax(-1) == dense.argmax(-1)).double().mean())
        assert got.divergence.top1 == pytest.approx(same, abs=1.5 / len(each))  # one tie may fall otherwise


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-untied"])
def test_the_models_own_table_has_a_divergence_of_exactly_zero(name, tokenizer):
    model = sharp(name)
    own = model.get_input_embeddings().weight.detach().clone()
    report = evaluate_perplexity(model, tokenizer, TEXTS, {"own": own, "noise": disturbed(model)})
    same, noise = report.tables
    for each in filter(None, (same.input_only, same.tied)):
        assert each.divergence.model_dump() == {"mean": 0, "p99": 0, "top1": 1}
    for each in filter(None, (noise.input_only, noise.tied)):
        assert each.divergence.mean > 0
        assert each.divergence.p99 > each.divergence.mean
        assert each.divergence.top1 < 1
    alone = evaluate_perplexity(model, tokenizer, TEXTS, {"own": own}, own=False)
    assert alone.tables[0].input_only.divergence is None


def test_figures_do_not_depend_on_blocks_batches_or_the_split(tokenizer, monkeypatch):
    model = sharp("bert")
    tables = {"noise": disturbed(model), "packed": packed_of(torch.randn(VOCABULARY, 32))}

    def figures(**settings):
        report = evaluate_perplexity(model, tokenizer, TEXTS, tables, **settings)
        return [
            (each.loss, each.divergence) for table in report.tables for each in (table.input_only, table.tied)
        ]

    expected = figures()
    changed = [figures(batch_size=1)]
    with monkeypatch.context() as patch:
        patch.setattr(divergence, "LOG_PROBABILITIES_AT_ONCE", 7 * VOCABULARY)
        changed.append(figures())
    monkeypatch.setattr(language_model, "_body_of", lambda model: (None, None))
    changed.append(figures())
    for got in changed:
        for (loss, ours), (expected_loss, theirs) in zip(got, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert ours.mean == pytest.approx(theirs.mean, rel=1e-3)
            assert ours.p99 == pytest.approx(theirs.p99, rel=1e-3)


def test_a_reference_of_another_kind_is_refused(tokenizer):
    bert = sharp("bert")
    small = T.BertForMaskedLM(T.BertConfig(vocab_size=20, **SIZES))
    with pytest.raises(
        ValueError, match="reference: expected a masked language model with 101 tokens, got a mas"
    ):
        evaluate_perplexity(bert, tokenizer, TEXTS, reference=small)
    with pytest.raises(ValueError, match="with 101 tokens, got a causal one with 101"):
        evaluate_perplexity(bert, tokenizer, TEXTS, reference=build("gpt2"))
    with pytest.raises(ValueError, match="reference: expected none with tables"):
        evaluate_perplexity(bert, tokenizer, TEXTS, {"t": disturbed(bert)}, reference=sharp("bert"))


# ---- saved models ----------------------------------------------------------------------------------------


def test_a_saved_model_and_its_reference(tmp_path, tokenizer, run_command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sharp("gpt2").save_pretrained("dense")
    tokenizer.save_pretrained("dense")
    embkern.compress("dense", method="svd", rank=9, output="svd")
    (tmp_path / "text.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    got = json.loads(
        run_command("perplexity", "svd", "--reference", "dense", "--dataset", "text.txt", "--json").out
    )
    swapped = measure_perplexity(["svd"], "text.txt", against="dense")
    assert got["reference"]["loss"] == pytest.approx(swapped.model.loss, rel=1e-5)
    tied = swapped.tables[0].tied
    assert got["model"]["loss"] == pytest.approx(tied.loss, rel=1e-5)
    assert got["model"]["divergence"]["mean"] == pytest.approx(tied.divergence.mean, rel=1e-3)
    assert got["nbytes"] == {"svd": (101 + 32) * 9 * 4, "dense": 101 * 32 * 4}
    itself = measure_perplexity(["dense"], "text.txt", reference="dense")
    assert itself.model.divergence.model_dump() == {"mean": 0, "p99": 0, "top1": 1}
    shown = run_command("perplexity", "svd", "--reference", "dense", "--dataset", "text.txt").out
    assert f"{tied.divergence.top1:.1%}" in shown
    with pytest.raises(ValueError, match="reference: expected without against"):
        measure_perplexity(["svd"], "text.txt", against="dense", reference="dense")

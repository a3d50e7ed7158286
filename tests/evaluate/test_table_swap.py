"""Another table in a dense model: the figures of the compressed model, and the model unchanged afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

T = pytest.importorskip("transformers")
import embkern
from embkern.evaluate import evaluate_perplexity
from embkern.evaluate.perplexity import perplexity
from embkern.models.table_swap import TableSwap
from tests.evaluate.language_models import TEXTS, sharp
from tests.example_tables import packed_of, quantizing  # noqa: F401 (a fixture)


def test_the_model_is_unchanged_afterwards(tokenizer):
    model = sharp("gpt2").train()
    table = packed_of(model.transformer.wte.weight.detach())
    before = dict(model.named_modules())
    own = dict(model.transformer.__dict__)

    def breaking():
        yield from TEXTS
        raise OSError("the connection is lost")

    evaluate_perplexity(model, tokenizer, TEXTS, {"packed": table})
    with pytest.raises(OSError, match="the connection is lost"):
        evaluate_perplexity(model, tokenizer, breaking(), {"packed": table})
    with pytest.raises(RuntimeError, match="inside"), TableSwap(model, table).inputs_and_heads():
        assert type(model.lm_head).__name__ == "PackedHead"
        raise RuntimeError("inside")
    after = dict(model.named_modules())
    assert before.keys() == after.keys()
    assert all(after[name] is each for name, each in before.items())
    assert {**model.transformer.__dict__, "training": True} == own
    assert model.training
    assert model.config.use_cache


@pytest.mark.usefixtures("quantizing")
@pytest.mark.parametrize("name", ["bert", "gpt2", "gemma3", "opt", "llama-untied"])
@pytest.mark.parametrize("recipe", [dict(method="svd", rank=9), dict(method="quantize", ratio=2)])
def test_a_table_gives_the_figures_of_the_compressed_model(name, recipe, tokenizer):
    made = {head: sharp(name) for head in ("factorized", "dense")}
    for head, model in made.items():
        embkern.compress(model, **recipe, lm_head=head)
    expected = {head: perplexity(model, tokenizer, TEXTS) for head, model in made.items()}

    model = sharp(name)
    table = made["dense"].get_input_embeddings().table
    report = evaluate_perplexity(
        model, tokenizer, TEXTS, {"small": table, "decoded": table.to_dense(), "own": dense_table(model)}
    )
    small, decoded, own = report.tables
    assert report.model.loss == pytest.approx(perplexity(sharp(name), tokenizer, TEXTS).loss, rel=1e-5)
    alone = evaluate_perplexity(model, tokenizer, TEXTS, {"small": table}, own=False)
    assert alone.model is None
    assert alone.tables[0].input_only.loss == pytest.approx(small.input_only.loss, rel=1e-5)
    assert own.input_only.loss == report.model.loss
    assert small.input_only.loss != report.model.loss, "without a swap both have the same bits"
    for each in (small, decoded):
        assert each.input_only.loss == pytest.approx(expected["dense"].loss, rel=1e-5)
        if name == "llama-untied":
            assert each.tied is None
        else:
            assert each.tied.loss == pytest.approx(expected["factorized"].loss, rel=1e-5)
            assert each.tied.loss != each.input_only.loss
            assert own.tied.loss == report.model.loss


def dense_table(model: Any) -> torch.Tensor:
    return model.get_input_embeddings().weight.detach().clone()


def test_a_table_with_an_activation_has_no_tied_figure(tokenizer):
    model = sharp("bert")
    factors = embkern.methods.autoencoder(dense_table(model), 5, epochs=1, activation="elu")
    table = evaluate_perplexity(model, tokenizer, TEXTS, {"elu": factors}).tables[0]
    assert table.input_only.loss > 0
    assert table.tied is None

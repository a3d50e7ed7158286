"""Language models: split into body and head or run as a whole, and models without a perplexity."""

from __future__ import annotations

import pytest
import torch

T = pytest.importorskip("transformers")
from embkern.evaluate import evaluate_perplexity, language_model
from embkern.evaluate.perplexity import perplexity
from embkern.tables import Factors
from tests.evaluate.language_models import SIZES, TEXTS, VOCABULARY, sharp
from tests.example_models import build
from tests.example_tables import packed_of


def test_a_model_without_a_body_runs_as_a_whole(tokenizer, monkeypatch):
    models = {name: sharp(name) for name in ("bert", "gpt2")}
    tables = {"packed": packed_of(torch.randn(VOCABULARY, 32))}
    in_parts = {n: evaluate_perplexity(model, tokenizer, TEXTS, tables) for n, model in models.items()}
    monkeypatch.setattr(language_model, "_body_of", lambda model: (None, None))
    for name, model in models.items():
        whole = evaluate_perplexity(model, tokenizer, TEXTS, tables)
        for ours, other in (
            (whole.model, in_parts[name].model),
            (whole.tables[0].input_only, in_parts[name].tables[0].input_only),
            (whole.tables[0].tied, in_parts[name].tables[0].tied),
        ):
            assert ours.loss == pytest.approx(other.loss, rel=1e-5)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert", "gpt2", "opt", "gemma3"])
def test_the_loss_needs_no_logits(name, tokenizer, monkeypatch):
    model = sharp(name)
    if hasattr(model.config, "final_logit_softcapping"):
        model.config.final_logit_softcapping = 5.0
    tables = {
        "packed": packed_of(torch.randn(VOCABULARY, 32)),
        "factors": Factors(torch.randn(VOCABULARY, 7), torch.randn(7, 32)),
        "dense": torch.randn(VOCABULARY, 32),
    }
    monkeypatch.setattr("embkern.ops.reference.cross_entropy.FEWEST_ROWS", 20)
    monkeypatch.setattr("embkern.ops.reference.cross_entropy.MOST_LOGITS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(language_model, "LOGITS_AT_ONCE", None)  # which blocks of logits would divide
        ours = evaluate_perplexity(model, tokenizer, TEXTS, tables)
    monkeypatch.setattr(language_model.SplitModel, "_agrees", lambda *_: False)
    theirs = evaluate_perplexity(model, tokenizer, TEXTS, tables)
    assert ours.model.loss == pytest.approx(theirs.model.loss, rel=1e-5)
    for one, other in zip(ours.tables, theirs.tables, strict=True):
        assert one.input_only.loss == pytest.approx(other.input_only.loss, rel=1e-5)
        assert one.tied.loss == pytest.approx(other.tied.loss, rel=1e-5)


@torch.no_grad()
def test_a_model_that_does_more_with_its_logits_runs_by_blocks(tokenizer):
    model = sharp("gpt2")
    expected = perplexity(model, tokenizer, TEXTS).loss

    class Scaled(type(model)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 0.5
            return output

    model.__class__ = Scaled
    assert not language_model.SplitModel(model)._without_logits
    model.__class__ = Scaled.__bases__[0]
    assert language_model.SplitModel(model)._without_logits
    assert perplexity(model, tokenizer, TEXTS).loss == pytest.approx(expected)


def test_blocks_of_logits_give_the_same_loss(tokenizer, monkeypatch):
    model = sharp("bert")
    monkeypatch.setattr(language_model.SplitModel, "_agrees", lambda *_: False)
    before = perplexity(model, tokenizer, TEXTS)
    monkeypatch.setattr(language_model, "LOGITS_AT_ONCE", 7 * VOCABULARY)
    assert perplexity(model, tokenizer, TEXTS).loss == pytest.approx(before.loss, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert-backbone", "model: BertModel has no language-model head"),
        ("t5", "model: T5ForConditionalGeneration is an encoder-decoder"),
        ("xlnet", "model: XLNetLMHeadModel attends to later tokens"),
        ("bert-lm", "model: BertLMHeadModel attends to later tokens"),
    ],
)
def test_models_without_a_perplexity_are_refused(name, message, tokenizer):
    if name == "xlnet":
        config = T.XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=48)
        model = T.XLNetLMHeadModel(config)
    else:
        bert = T.BertConfig(vocab_size=VOCABULARY, **SIZES)
        model = T.BertLMHeadModel(bert) if name == "bert-lm" else build(name)
    with pytest.raises(ValueError, match=message):
        perplexity(model, tokenizer, TEXTS)

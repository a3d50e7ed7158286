"""Perplexity: transformers' own losses, and figures that follow from text, model and seed alone."""

from __future__ import annotations

import math

import pytest
import torch

T = pytest.importorskip("transformers")
from embkern.evaluate import evaluate_perplexity
from embkern.evaluate.perplexity import perplexity
from tests.evaluate.language_models import SIZES, TEXTS, masks, sharp, subwords
from tests.example_models import build

# ---- against transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_causal_models_have_transformers_own_loss(name, tokenizer):
    model, (length, stride) = sharp(name), (32, 12)
    ids = tokenizer("\n".join(TEXTS), return_tensors="pt").input_ids[:, :-1]  # it begins with [CLS]
    total, count, end = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):  # as transformers documents it
        before, end = end, min(begin + length, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : before - end] = -100 if before else labels[:, : before - end]
        scored = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(ids[:, begin:end], labels=labels).loss) * scored
        count += scored
        if end == ids.shape[1]:
            break
    assert count == ids.shape[1] - 1, "every token but the first, once"
    got = perplexity(model, tokenizer, TEXTS, max_length=length, stride=stride)
    assert (got.kind, got.tokens) == ("causal", count)
    assert got.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_masked_models_have_transformers_own_loss(name, tokenizer):
    model = sharp(name)
    total = count = 0
    for window in masks(TEXTS, tokenizer, max_length=40):
        labels = torch.full((1, len(window.ids)), -100)
        labels[0, window.positions] = torch.from_numpy(window.targets)
        with torch.no_grad():
            loss = model(torch.from_numpy(window.ids)[None], labels=labels).loss
        total, count = total + float(loss) * len(window.targets), count + len(window.targets)
    got = perplexity(model, tokenizer, TEXTS, max_length=40)
    assert (got.kind, got.tokens) == ("masked", count)
    assert got.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


# ---- what a figure depends on ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2"])
def test_figures_do_not_depend_on_the_batch_size_and_are_reproducible(name, tokenizer):
    model = sharp(name)
    first, *others = [
        perplexity(model, tokenizer, iter(TEXTS), batch_size=size, max_length=48) for size in (8, 8, 1, 5)
    ]
    assert others[0] == first, "the same bits"
    for each in others:
        assert each.tokens == first.tokens
        assert each.loss == pytest.approx(first.loss, rel=1e-5)
    if name != "gpt2":
        assert perplexity(model, tokenizer, TEXTS, seed=1).loss != first.loss


# ---- arguments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("bert", {"max_length": 65}, "max_length: expected at most the model's 64, got 65"),
        ("roberta", {"max_length": 64}, "max_length: expected at most the model's 63, got 64"),
        ("bert", {"stride": 3}, "stride: expected with causal models only"),
        ("bert", {"separator": "eos"}, "separator: expected with causal models only"),
        ("bert", {"beginning": "window"}, "beginning: expected with causal models only"),
        ("gpt2", {"stride": 65}, r"stride: expected at most max_length \(64\), got 65"),
        ("gpt2", {"line_filter": "authors"}, "line_filter: expected with masked models only"),
        ("bert", {"mask_probability": 1.5}, "perplexity: mask_probability: .* got 1.5"),
        ("bert", {"masking": "all"}, "masking: .*'80-10-10' or 'mask'"),
        ("bert", {"seeed": 1}, r"seeed: .*\(known: seed, "),
    ],
)
def test_settings_out_of_range_are_refused(name, settings, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        perplexity(build(name), tokenizer, TEXTS, **settings)


def test_arguments_that_do_not_fit_are_refused(tokenizer):
    bert = build("bert")
    with pytest.raises(TypeError, match="texts: expected an iterable of str"):
        perplexity(bert, tokenizer, "a text")
    with pytest.raises(ValueError, match="texts: expected tokens to predict, found none"):
        perplexity(bert, tokenizer, [])
    with pytest.raises(ValueError, match="tokenizer: expected the model's, got None"):
        perplexity(bert, None, TEXTS)
    with pytest.raises(ValueError, match="tables: expected at least one without the model's own"):
        evaluate_perplexity(bert, tokenizer, TEXTS, own=False)
    with pytest.raises(ValueError, match=r"tables: expected the model's \(101, 32\), got \(101, 31\)"):
        evaluate_perplexity(bert, tokenizer, TEXTS, {"narrow": torch.zeros(101, 31)})
    small = T.BertForMaskedLM(T.BertConfig(vocab_size=20, **SIZES))
    with pytest.raises(ValueError, match="tokenizer: has ids beyond the model's 20 tokens"):
        perplexity(small, tokenizer, TEXTS)
    tokenizer = subwords("byte level")
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="tokenizer: has no mask token"):
        perplexity(bert, tokenizer, TEXTS)

"""Fisher row weights compared with autograd, for every kind of head and of lookup."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
import torch
import transformers as T
from torch.testing import assert_close

from embkern.methods.direction import direction
from embkern.models.fisher import fisher_row_weights, fisher_weights
from tests.example_models import MODELS, V, word_tokenizer

TEXTS = ["red green green blue", "blue red", "green blue blue red"]


@pytest.fixture
def tokenizer() -> T.PreTrainedTokenizerFast:
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def by_autograd(model, tokenizer, scale=1.0):
    """Row weights from the dense gradient of an untied table."""
    weight, total = model.get_input_embeddings().weight, torch.zeros(V, dtype=torch.float64)
    for text in TEXTS:
        batch = tokenizer(text, return_tensors="pt")
        (gradient,) = torch.autograd.grad(model(**batch, labels=batch["input_ids"]).loss, weight)
        total += gradient.double().square().sum(1)
    return total / len(TEXTS)


def test_it_is_the_mean_square_of_the_gradient(tokenizer):
    model = MODELS["llama-untied"]()
    weight = fisher_row_weights(model, tokenizer, TEXTS, progress=False)
    assert weight.dtype == torch.float64
    assert_close(weight, by_autograd(model, tokenizer), rtol=1e-4, atol=1e-12)
    read = set(tokenizer(" ".join(TEXTS))["input_ids"])
    assert set(torch.nonzero(weight).flatten().tolist()) == read
    assert direction(
        model.get_input_embeddings().weight, 4, row_weight=weight, cosine_weight=0, mse_weight=1
    ).facts["converged"]


@pytest.mark.parametrize("name", ["bert", "bert-backbone", "gpt2", "gemma3", "t5", "bart-scaled"])
def test_every_kind_of_head_and_lookup(name, tokenizer):
    model = MODELS[name]().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weight, again = (fisher_row_weights(model, tokenizer, TEXTS, progress=False) for _ in range(2))
    assert torch.equal(weight, again)
    assert weight.shape == (V,)
    assert torch.isfinite(weight).all()
    assert (weight >= 0).all()
    assert all(weight[tokenizer(word)["input_ids"][0]] > 0 for word in ("green", "blue"))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_scaled_lookup_is_differentiated_by_its_row(tokenizer):
    # The scaled table without a scale is the same function of the ids.
    model = MODELS["gemma3"]()
    embedding = model.get_input_embeddings()
    scale = float(embedding.embed_scale)
    weight = fisher_row_weights(model, tokenizer, TEXTS, progress=False)
    with torch.no_grad():
        head = torch.nn.Linear(*embedding.weight.shape[::-1], bias=False)
        head.weight.copy_(embedding.weight)
        model.lm_head = head
        embedding.weight = torch.nn.Parameter(embedding.weight * scale)
        embedding.embed_scale.fill_(1.0)
        embedding.scalar_embed_scale = 1.0
    assert_close(by_autograd(model, tokenizer) * scale**2, weight, rtol=1e-3, atol=1e-12)


def test_texts_without_a_loss_and_foreign_tokenizers_are_refused(tokenizer):
    model = MODELS["llama-untied"]()
    with pytest.raises(ValueError, match="texts: expected at least one with a token .* got none"):
        fisher_row_weights(model, tokenizer, ["", "red"], progress=False)
    tokenizer.add_tokens([f"word{number}" for number in range(V)])
    with pytest.raises(
        ValueError, match=f"tokenizer: expected ids below {V}, .* does it belong to the model"
    ):
        fisher_row_weights(model, tokenizer, [f"word{V - 1}"], progress=False)
    assert not any(module._forward_hooks for module in model.modules())


def entries_by_autograd(model, tokenizer):
    """Weights of the entries of a table from its whole gradient."""
    weight = model.get_input_embeddings().weight
    total = torch.zeros(weight.shape, dtype=torch.float64)
    for text in TEXTS:
        batch = tokenizer(text, return_tensors="pt")
        (gradient,) = torch.autograd.grad(model(**batch, labels=batch["input_ids"]).loss, weight)
        total += gradient.double().square()
    return total / len(TEXTS)


def test_entries_are_the_mean_square_of_the_gradient_and_add_up_to_rows(tokenizer):
    model = MODELS["llama-untied"]()
    weight = fisher_weights(model, tokenizer, TEXTS, progress=False)
    assert weight.dtype == torch.float32
    assert_close(weight.double(), entries_by_autograd(model, tokenizer), rtol=1e-4, atol=1e-10)
    rows = fisher_row_weights(model, tokenizer, TEXTS, progress=False)
    assert_close(weight.sum(1, dtype=torch.float64), rows, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma3"])
def test_the_gradient_through_a_tied_head_counts_if_asked(name, tokenizer):
    model = MODELS[name]()
    trained = model.get_input_embeddings().weight.requires_grad
    weight = fisher_weights(model, tokenizer, TEXTS, head=True, progress=False)
    whole = entries_by_autograd(model, tokenizer)
    assert_close(weight.double(), whole, rtol=1e-3, atol=1e-9)
    assert (weight.sum(1) > 0).all()
    lookups = fisher_weights(model, tokenizer, TEXTS, progress=False)
    assert (lookups.sum(1) == 0).any()
    assert model.get_input_embeddings().weight.requires_grad == trained
    assert not any(module._forward_hooks for module in model.modules())


def test_text_is_read_until_the_tokens_suffice(tokenizer):
    model, read = MODELS["llama-untied"](), []

    def texts():
        for text in TEXTS:
            read.append(text)
            yield text

    some = fisher_weights(model, tokenizer, texts(), tokens=5, progress=False)
    assert read == TEXTS[:2]
    assert torch.equal(some, fisher_weights(model, tokenizer, TEXTS[:2], progress=False))
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="tokens: expected at least 1, got 0"):
        fisher_weights(model, tokenizer, TEXTS, tokens=0)
    with pytest.raises(ValueError, match="head: expected a model whose output head shares the table"):
        fisher_weights(model, tokenizer, TEXTS, head=True)
    with pytest.raises(ValueError, match="texts: expected at least one with a token"):
        fisher_weights(model, tokenizer, ["red"], progress=False)

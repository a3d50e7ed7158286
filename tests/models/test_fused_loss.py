"""The training loss of a compressed model without logits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")
import embkern
from embkern.models.fused_loss import enable_fused_loss
from embkern.nn.base import CompressedHead
from tests.example_models import build

IDS = torch.arange(24).view(2, 12) * 5 % 101
LABELS = IDS.clone()
LABELS[0, :5] = -100


def compressed(name, method="svd", **config):
    model = build(name)
    for key, value in config.items():
        setattr(model.config, key, value)
    options = dict(rank=8) if method == "svd" else dict(ratio=4)
    embkern.compress(model, method=method, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def step(model, **options):
    model.zero_grad()
    output = model(input_ids=IDS, labels=LABELS, **options)
    output.loss.backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["svd", "allocate"])
@pytest.mark.parametrize(
    ("name", "config"),
    [("llama-tied", {}), ("qwen3", {}), ("gemma3", {}), ("gemma3", dict(final_logit_softcapping=2.0)),
     ("gpt2", {}), ("modernbert", {})],
)  # fmt: skip
def test_loss_and_gradients_are_those_of_the_logits(name, config, method):
    model = compressed(name, method, **config)
    for options in ({}, dict(num_items_in_batch=torch.tensor(7)), dict(num_items_in_batch=5)):
        expected, wanted = step(model, **options)
        fused = enable_fused_loss(model)
        output, grads = step(model, **options)
        fused.remove()
        assert output.logits.shape == (2, 12, 0)
        assert_close(output.loss, expected.loss)
        assert grads.keys() == wanted.keys()
        for key, grad in grads.items():
            assert_close(grad, wanted[key], rtol=1e-3, atol=1e-5 * float(wanted[key].abs().max()) + 1e-7)
    assert step(model)[0].logits.shape == (2, 12, 101)


def test_evaluation_and_calls_without_labels_have_logits():
    model = compressed("llama-tied")
    expected = model(input_ids=IDS, labels=LABELS)
    enable_fused_loss(model)
    assert model(input_ids=IDS).logits.shape == (2, 12, 101)
    model.eval()
    output = model(input_ids=IDS, labels=LABELS)
    assert output.logits.shape == (2, 12, 101)
    assert_close(output.loss, expected.loss)
    model.train()
    with pytest.raises(IndexError, match="labels: expected 0 <= label < 101"):
        model(input_ids=IDS, labels=LABELS + 101)
    head = model.get_output_embeddings()
    assert "forward" not in head.__dict__  # a failed call leaves the head as it was
    twin = copy.deepcopy(model)
    assert twin(input_ids=IDS, labels=LABELS).logits.shape == (2, 12, 0)
    assert twin.get_output_embeddings() is not head


@pytest.mark.parametrize(
    ("name", "message"),
    [("bert", "BertForMaskedLM does more"), ("llama-untied", "expected LlamaForCausalLM with a compressed")],
)
def test_models_with_another_loss_are_refused(name, message):
    model = compressed(name)
    assert (name == "bert") == isinstance(model.get_output_embeddings(), CompressedHead)
    before = dict(model._forward_hooks), dict(model._forward_pre_hooks), model.loss_function
    with pytest.raises(ValueError, match=message):
        enable_fused_loss(model)
    assert (dict(model._forward_hooks), dict(model._forward_pre_hooks), model.loss_function) == before
    assert model.training


def test_a_scaled_logit_is_refused():
    model = compressed("llama-tied")

    class Scaled(type(model)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.loss = output.loss * (2.0 if output.logits.shape[-1] else 1.0)
            return output

    model.__class__ = Scaled
    with pytest.raises(ValueError, match="Scaled does more .loss"):
        enable_fused_loss(model)

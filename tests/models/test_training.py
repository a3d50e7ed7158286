"""``unfreeze_table`` and ``freeze_table``: fine-tuning compressed models."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from torch.testing import assert_close

T = pytest.importorskip("transformers")

import embkern
from embkern.nn.base import CompressedEmbedding, CompressedHead
from tests.example_models import H, V, build, outputs
from tests.models.compressing import compressed, held, reload, round_as_stored

pytestmark = pytest.mark.usefixtures("quantizing")
IDS = torch.arange(3, 21).reshape(2, 9)


def train(model, optimizer: type[torch.optim.Optimizer], lr: float, steps: int, ids=IDS) -> list[float]:
    stepped = optimizer([each for each in model.parameters() if each.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        stepped.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        stepped.step()
        losses.append(float(loss.detach()))
    return losses


def over(model) -> list:
    return [m for m in model.modules() if isinstance(m, (CompressedEmbedding, CompressedHead))]


@pytest.mark.parametrize("unfrozen", [False, True])
def test_a_table_is_frozen_whatever_the_flags_say(kind, unfrozen):
    model = compressed(build("gpt2"), kind)
    assert not any(each.requires_grad for module in over(model) for each in held(module).values())
    before = {name: tensor.clone() for name, tensor in held(model.get_input_embeddings()).items()}
    expected = nullcontext()
    if unfrozen:
        model.requires_grad_(True)  # as scripts do to everything
        expected = pytest.warns(
            UserWarning, match=r"gets no gradients: .*call embkern.unfreeze_table\(model\)"
        )
    with expected:
        losses = train(model, torch.optim.AdamW, 1e-3, 3)
    assert losses[-1] < losses[0], "the rest of the model trains"
    for name, tensor in held(model.get_input_embeddings()).items():
        assert torch.equal(before[name], tensor), name


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "llama-tied", "llama-untied", "bart"])
def test_a_trained_table_is_shared_saved_and_frozen_again(tmp_path, name, kind):
    model = compressed(build(name), kind).eval()
    (adjustment,) = embkern.unfreeze_table(model).values()
    assert all(module.adjustment is adjustment for module in over(model))
    (again,) = embkern.unfreeze_table(model, "input").values()
    assert again is adjustment
    rows = model.get_input_embeddings().weight.detach().clone()
    losses = train(model, torch.optim.AdamW, 1e-3, 3)
    assert losses[-1] < losses[0]
    assert all(change.any() for change in adjustment.parameters())
    trained = outputs(model)
    assert not torch.equal(rows, model.get_input_embeddings().weight)

    loaded = reload(model, tmp_path)
    assert not any("adjustment" in key for key in loaded.state_dict())
    assert torch.equal(outputs(model), trained), "saving changes nothing"
    assert_close(copy.deepcopy(model).dequantize()(**inputs(model)).logits, trained, atol=2e-6, rtol=1e-5)

    embkern.freeze_table(model)
    assert_close(outputs(model), trained, atol=1e-6, rtol=1e-5)
    assert not any("adjustment" in key for key in model.state_dict())
    assert not any(each.requires_grad for module in over(model) for each in held(module).values())
    assert_close(outputs(loaded), outputs(round_as_stored(model)), atol=1e-6, rtol=1e-5)


def inputs(model) -> dict[str, torch.Tensor]:
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    return given | ({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})


@pytest.mark.parametrize("lr", [5e-5, 1e-3])
@pytest.mark.parametrize("name", ["bert", "llama-tied"])
def test_rows_move_as_those_of_a_dense_model_at_most(name, lr, kind):
    steps, moved = 10, []
    for compress in (False, True):
        model = build(name).train(False)
        if compress:
            embkern.unfreeze_table(compressed(model, kind))
        before = model.get_input_embeddings().weight.detach().clone()
        train(model, torch.optim.AdamW, lr, steps)
        moved.append((model.get_input_embeddings().weight.detach() - before).norm(dim=1))
    dense, ours = moved
    # A dense row moves by at most sqrt(H) lr per step, when all gradients keep their signs. A compressed one
    # has three ways to move: alone, with the basis and with the offset.
    assert dense.max() <= 1.5 * steps * lr * math.sqrt(H)
    assert ours.median() <= 3 * steps * lr * math.sqrt(H)
    assert ours.max() <= 6 * steps * lr * math.sqrt(H)
    assert ours.max() > 0


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_new_row_trains_without_growing(optimizer, kind):
    model = compressed(build("llama-tied"), kind)
    embkern.unfreeze_table(model)
    embedding = embkern.resize_token_embeddings(model, V + 2)
    assert all(module.adjustment is embedding.adjustment is not None for module in over(model))
    before = embedding.weight[-1].detach().clone()
    train(model, optimizer, 1e-3, 5, ids=torch.full((2, 9), V + 1))
    after = embedding.weight[-1].detach()
    assert not torch.equal(after, before)
    # The mean row of a random table is short: the steps are compared with the other rows.
    assert (after - before).norm() <= 3 * 5 * 1e-3 * math.sqrt(H)


def test_training_in_16_bits_keeps_changes_in_fp32(kind):
    model = compressed(build("llama-tied").bfloat16(), kind)
    (adjustment,) = embkern.unfreeze_table(model).values()
    assert {change.dtype for change in adjustment.parameters()} == {torch.float32}
    train(model, torch.optim.AdamW, 1e-5, 2)
    assert outputs(model).dtype == torch.bfloat16
    assert all(change.any() for change in adjustment.parameters())


def test_a_dense_model_has_no_table_to_unfreeze():
    with pytest.raises(ValueError, match="model: expected one compressed by embkern, got a dense one"):
        embkern.unfreeze_table(build("gpt2"))

"""Replacing a model's table: outputs, hooks, gradient checkpointing, compilation, and dequantizing."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

T = pytest.importorskip("transformers")

from embkern import unfreeze_table
from embkern.models.find_table import UnsupportedModelError
from tests.example_models import MODELS, build, outputs
from tests.models.compressing import assert_shared, compressed, held, reload

pytestmark = pytest.mark.usefixtures("quantizing")


@pytest.mark.parametrize("lm_head", ["factorized", "dense"])
@pytest.mark.parametrize("name", MODELS)
def test_full_rank_equals_the_dense_model(name, lm_head):
    model = build(name)
    expected, width = outputs(model), model.get_input_embeddings().embedding_dim
    compressed(model, rank=width, lm_head=lm_head, options={})
    assert_close(outputs(model), expected, atol=2e-5, rtol=1e-4)


def test_casts_leave_the_codes_alone():
    model = compressed(build("gpt2"), "packed")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    before = {name: tensor.clone() for name, tensor in held(embedding).items()}
    for cast in (model.half, model.bfloat16, model.double):
        cast()
        assert_shared(embedding, head)
        for name, tensor in held(embedding).items():
            if not before[name].is_floating_point():
                assert torch.equal(tensor, before[name]), name
                assert tensor.dtype == before[name].dtype


def test_dequantize_after_saving_and_after_a_cast(tmp_path, kind):
    model = compressed(build("gpt2"), kind)
    model.save_pretrained(tmp_path)  # leaves config.dtype a string
    model.double().dequantize()
    assert outputs(model).dtype == torch.float64


def test_models_that_share_a_config_do_not_share_the_compression(tmp_path):
    config = build("bert-backbone").config
    first, second = T.BertModel(config), T.BertModel(config)
    compressed(first)
    assert first.encoder.config is first.config
    reload(second, tmp_path / "second")
    assert reload(first, tmp_path / "first").get_input_embeddings().rank == 7


def test_hooks_of_the_embedding_are_kept(kind):
    model = build("gpt2")
    model.enable_input_require_grads()
    compressed(model, kind)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert model.transformer.wte(torch.tensor([3])).requires_grad
    model.disable_input_require_grads()
    assert not model.transformer.wte(torch.tensor([3])).requires_grad


def test_gradient_checkpointing_gives_the_same_gradients(kind):
    model = compressed(build("llama-tied"), kind).train()
    unfreeze_table(model)
    ids = torch.arange(3, 21).reshape(2, 9)
    grads = []
    for _ in range(2):
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        model.gradient_checkpointing_enable()
    assert_close(grads[0], grads[1])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, grad in grads[0].items() if grad is not None} == trained


@pytest.mark.parametrize("name", ["bert", pytest.param("bart", marks=pytest.mark.slow), "gpt2"])
def test_a_compressed_model_compiles(name, kind):
    model = compressed(build(name), kind)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert_close(outputs(compiled), outputs(model), atol=1e-5, rtol=1e-4)


def test_a_tied_head_refuses_an_activation_and_leaves_the_model_alone():
    model = build("gpt2")
    before = outputs(model)
    elu = dict(method="autoencoder", options={"activation": "elu", "epochs": 1})
    with pytest.raises(
        UnsupportedModelError, match="lm_head: a tied head cannot decode through activation 'elu'"
    ):
        compressed(model, **elu)
    assert torch.equal(outputs(model), before)
    compressed(model, **elu, lm_head="dense")
    assert model.get_input_embeddings().activation == "elu"

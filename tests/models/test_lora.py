"""LoRA of PEFT on compressed embeddings and heads: the formula, gradients, and adapters saved and loaded."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import embkern
from tests.example_models import V, build
from tests.example_tables import quantizing  # noqa: F401 (a fixture)
from tests.saved_models import PACKED, SVD

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quantizing")]
TARGETS = {
    "llama-tied": ["q_proj", "embed_tokens", "lm_head"],
    "gemma3": ["embed_tokens", "lm_head"],  # whose embedding is scaled
    "bert": ["word_embeddings", "decoder"],
}


def config_of(name: str, **options):
    return embkern.enable_lora(peft.LoraConfig(target_modules=TARGETS[name], r=4, **options))


def compressed(name: str, recipe: dict):
    model = build(name)
    embkern.compress(model, **recipe)
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture
def ids():
    return torch.randint(1, V, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("recipe", [PACKED, SVD], ids=["packed", "factors"])
def test_an_adapter_is_added_to_the_decoded_table(name, recipe, ids):
    model = compressed(name, recipe)
    before, dense = logits(model, ids), model.get_input_embeddings().weight.detach().clone()
    scale = model.get_input_embeddings().scale
    adapted = peft.get_peft_model(model, config_of(name))
    assert_close(logits(adapted, ids), before)  # One of the factors is zero at first.
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        for parameter in (embedding.lora_embedding_A["default"], embedding.lora_embedding_B["default"]):
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    delta = embedding.get_delta_weight("default")
    assert_close(embedding(ids), (dense + delta)[ids] * scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TARGETS)
def test_the_adapter_is_trained_and_the_table_is_not(name, ids):
    adapted = peft.get_peft_model(compressed(name, PACKED), config_of(name))
    trained = [key for key, each in adapted.named_parameters() if each.requires_grad]
    assert trained
    assert all("lora_" in key for key in trained)
    loss = adapted(input_ids=ids, labels=ids).loss
    loss.backward()
    assert any(bool(each.grad.any()) for key, each in adapted.named_parameters() if "embedding_A" in key)


def test_an_adapter_is_saved_and_loaded(ids, tmp_path):
    adapted = peft.get_peft_model(compressed("llama-tied", PACKED), config_of("llama-tied"))
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(tmp_path)
    config = embkern.enable_lora(peft.LoraConfig.from_pretrained(tmp_path))
    loaded = peft.PeftModel.from_pretrained(compressed("llama-tied", PACKED), tmp_path, config=config)
    assert_close(logits(loaded, ids), logits(adapted, ids))


def test_merging_is_refused_and_unloading_restores(ids):
    model = compressed("llama-tied", PACKED)
    before = logits(model, ids)
    adapted = peft.get_peft_model(model, config_of("llama-tied"))
    with pytest.raises(RuntimeError, match="dequantize"):
        adapted.merge_and_unload()
    assert_close(logits(adapted.unload(), ids), before)

"""PEFT trains rows of some tokens beside a compressed table, and refuses to train a copy of one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import embkern
from tests.conftest import seed_of
from tests.example_models import H, V, build
from tests.example_tables import quantizing  # noqa: F401 (a fixture)
from tests.saved_models import PACKED, SVD

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quantizing")]
TOKENS = [3, 90, 7]
NAMES = ["llama-tied", "gemma3", "bert"]  # the embedding of gemma3 is scaled, the head of bert has a bias
EMBEDDINGS = {"llama-tied": "embed_tokens", "gemma3": "embed_tokens", "bert": "word_embeddings"}
recipes = pytest.mark.parametrize("recipe", [PACKED, SVD], ids=["packed", "factors"])


def compressed(name: str, recipe: dict = PACKED):
    model = build(name)
    embkern.compress(model, **recipe)
    return model


def config_of(kind: str):
    if kind == "alone":
        return peft.TrainableTokensConfig(token_indices=TOKENS)
    options = dict(target_modules=["q_proj", "query"], r=4, trainable_token_indices=TOKENS)
    return peft.LoraConfig(**options, ensure_weight_tying=kind == "lora, tied")


def rows_of(adapted) -> torch.nn.Parameter:
    """Return the trained rows of an adapter, of which there are as many as tokens."""
    (rows,) = (each for name, each in adapted.named_parameters() if "trainable_tokens_delta" in name)
    assert rows.shape == (len(TOKENS), H)
    return rows


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture
def ids() -> torch.Tensor:
    drawn = torch.randint(1, V, (2, 9), generator=torch.Generator().manual_seed(seed_of(0)))
    drawn[:, 2:5] = torch.tensor(TOKENS)
    return drawn


@recipes
@pytest.mark.parametrize("kind", ["alone", "lora", "lora, tied"])
@pytest.mark.parametrize("name", NAMES)
def test_trained_rows_take_the_place_of_those_stored(name, kind, recipe, ids):
    model = compressed(name, recipe)
    before, table = logits(model, ids), model.get_input_embeddings()
    weight, scale = table.weight.detach().clone(), table.scale
    bias = model.get_output_embeddings().bias
    adapted = peft.get_peft_model(model, config_of(kind))
    assert_close(logits(adapted, ids), before, rtol=1e-4, atol=1e-5)
    rows, hidden = rows_of(adapted), torch.randn(4, H)
    with torch.no_grad():
        weight[TOKENS] = rows.normal_()
        assert_close(model.get_input_embeddings()(ids), F.embedding(ids, weight) * scale)
        assert_close(
            model.get_output_embeddings()(hidden), F.linear(hidden, weight, bias), rtol=1e-4, atol=1e-4
        )
    with adapted.disable_adapter():
        assert_close(logits(adapted, ids), before)


@pytest.mark.parametrize("name", NAMES)
def test_only_these_rows_are_trained(name, ids, monkeypatch):
    model = compressed(name)
    table = model.get_input_embeddings()
    weight = table.weight.detach().clone()
    adapted = peft.get_peft_model(model, config_of("alone"))
    trained = [each for each in adapted.parameters() if each.requires_grad]
    rows = rows_of(adapted)
    assert [id(each) for each in trained] == [id(rows)]
    before = rows.detach().clone()
    decode = type(table)._rows
    monkeypatch.setattr(
        type(table), "_rows", lambda self, ids, *a, **k: decode(self, ids, *a, **k) if len(ids) < V else 1 / 0
    )  # the whole table is not decoded
    adapted(input_ids=ids, labels=ids).loss.backward()
    monkeypatch.undo()
    torch.optim.SGD(trained, 0.1).step()
    assert (rows != before).any(1).all()
    assert torch.equal(table.weight.detach(), weight)


def test_an_adapter_of_rows_is_saved_and_loaded(ids, tmp_path):
    adapted = peft.get_peft_model(compressed("llama-tied"), config_of("lora"))
    with torch.no_grad():
        rows_of(adapted).normal_()
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 30_000, "it has no table"
    loaded = peft.PeftModel.from_pretrained(compressed("llama-tied"), tmp_path)
    assert_close(logits(loaded, ids), logits(adapted, ids))


def test_merging_rows_is_refused_and_unloading_restores(ids):
    model = compressed("llama-tied")
    before = logits(model, ids)
    adapted = peft.get_peft_model(model, config_of("lora"))
    with torch.no_grad():
        rows_of(adapted).normal_()
    with pytest.raises((AttributeError, RuntimeError), match="weight.* dense table"):
        adapted.merge_and_unload()
    assert_close(logits(adapted.unload(), ids), before)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_of_a_table_is_refused_and_the_ways_are_named(name, tied):
    config = peft.LoraConfig(
        target_modules=["q_proj", "query"], modules_to_save=[EMBEDDINGS[name]], ensure_weight_tying=tied
    )
    with pytest.raises(
        ValueError, match="^modules_to_save: expected no compressed table, got .*"
        "trainable_token_indices, .*embkern.enable_lora.*, .*embkern.unfreeze_table"
    ):  # fmt: skip
        peft.get_peft_model(compressed(name), config)


def test_dense_models_are_trained_as_ever(ids):
    model = build("llama-tied")
    rows = model.get_input_embeddings().weight.detach()[TOKENS].clone()
    adapted = peft.get_peft_model(model, config_of("lora"))
    assert torch.equal(rows_of(adapted), rows)
    saved = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    assert peft.get_peft_model(build("llama-tied"), saved)(input_ids=ids).logits.shape == (2, 9, V)

"""Models with tables of other representations: save, load, generate, dequantise, train and resize."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

pytest.importorskip("transformers")

import embkern
from embkern import EmbkernConfig
from embkern.models.checkpoint import model_bytes, stored_table
from embkern.nn import TableEmbedding, TableHead
from tests.example_models import V, build, outputs
from tests.methods.row_tables import needs_faiss
from tests.models.compressing import RECIPES, assert_shared, compressed, held, reload, round_as_stored
from tests.models.test_training import over, train

KINDS = [
    pytest.param(kind, marks=needs_faiss if kind == "product" else (), id=kind)
    for kind in RECIPES
    if kind not in ("factors", "packed")
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-tied", "t5", "gemma3"])
def test_round_trip(tmp_path, name, kind):
    """Compressed in place, saved, reloaded, generating and dequantised; and compressed while loading."""
    model = build(name)
    model.save_pretrained(tmp_path / "dense")
    dense_bytes, dense_table = model_bytes(model), model.get_input_embeddings().weight.nbytes
    compressed(model, kind)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, TableEmbedding)
    assert isinstance(head, TableHead)
    assert_shared(*over(model))
    assert model_bytes(model) == dense_bytes - dense_table + stored_table(model).nbytes
    small = outputs(model)
    loaded = reload(model, tmp_path / "small")
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    table = {
        key.rpartition(".")[2]: each
        for key, each in tensors.items()
        if key.rpartition(".")[2] in held(embedding)
    }
    assert sum(each.nbytes for each in table.values()) == stored_table(model).nbytes
    assert torch.equal(outputs(loaded), outputs(round_as_stored(model)))
    assert_close(outputs(loaded), small, atol=1e-6, rtol=1e-5)
    again = reload(loaded, tmp_path / "again")
    files = [(tmp_path / each / "model.safetensors").read_bytes() for each in ("small", "again")]
    assert files[0] == files[1]
    if again.can_generate():
        prompt = torch.arange(3, 9).reshape(1, 6)
        out = again.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, min_new_tokens=2
        )
        assert out.shape[1] >= 3
    again.dequantize()
    assert not over(again)
    assert_close(outputs(again), small, atol=2e-6, rtol=1e-5)
    config = EmbkernConfig(**RECIPES[kind])
    on_the_fly = type(model).from_pretrained(tmp_path / "dense", quantization_config=config)
    assert type(on_the_fly.get_input_embeddings()) is TableEmbedding
    assert_close(outputs(reload(on_the_fly, tmp_path / "fly")), outputs(on_the_fly), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_shared_with_the_head_and_saved(tmp_path, kind):
    model = compressed(build("gpt2"), kind)
    (adjustment,) = embkern.unfreeze_table(model).values()
    losses = train(model, torch.optim.AdamW, 1e-3, 3)
    assert losses[-1] < losses[0]
    assert all(change.any() for change in adjustment.parameters())
    trained = outputs(model)
    loaded = reload(model, tmp_path)
    assert torch.equal(outputs(model), trained), "saving changes nothing"
    embkern.freeze_table(model)
    assert_close(outputs(model), trained, atol=1e-6, rtol=1e-5)
    assert torch.equal(outputs(loaded), outputs(round_as_stored(model)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [V + 9, V - 30])
def test_resize(tmp_path, kind, size):
    model = compressed(build("gpt2"), kind)
    rows = model.get_input_embeddings().weight.detach().clone()
    if kind == "tensor train" and size > V:
        with pytest.raises(ValueError, match="num_embeddings: a tensor train cannot hold new rows"):
            embkern.resize_token_embeddings(model, size)
        return
    embedding = embkern.resize_token_embeddings(model, size)
    assert torch.equal(embedding.weight[: min(size, V)], rows[:size])
    assert_shared(*over(model))
    assert outputs(model).shape[-1] == size
    if size > V:
        mean = rows.mean(0, keepdim=True)
        cosines = torch.cosine_similarity(rows, mean)
        assert_close(torch.cosine_similarity(embedding.weight[-1:], mean)[0], cosines.max())
        assert torch.isclose(embedding.weight[-1], rows, rtol=1e-4).all(1).any(), "a copy"
    loaded = reload(model, tmp_path)
    assert_close(outputs(loaded), outputs(round_as_stored(model)), atol=1e-6, rtol=1e-5)
    assert outputs(loaded.dequantize()).shape[-1] == size


def test_the_logits_without_a_table_are_those_of_the_loss():
    model = compressed(build("llama-tied"), "scalar, rounded")
    embkern.unfreeze_table(model)
    ids = torch.arange(3, 21).reshape(2, 9)
    expected = model.train()(input_ids=ids, labels=ids).loss
    embkern.enable_fused_loss(model)
    got = model(input_ids=ids, labels=ids)
    assert got.logits.shape[-1] == 0
    assert_close(got.loss, expected)


def test_a_damaged_description_is_refused(tmp_path):
    model = compressed(build("bert-backbone"), "scalar, rounded")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    described = config["quantization_config"]
    described.pop("checksum")
    described["format_version"] = 1
    for name, value, message in (
        ("bits", 0, "bits: expected an integer, 1 to 8, got 0"),
        ("group", "32", "group: expected an integer, 1 to 2147483647, got '32'"),
        ("embedding_dim", 31, "packed_codes: expected shape"),
    ):
        kept = described["table"]["settings"][name]
        described["table"]["settings"][name] = value
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"table is damaged: {message}"):
            type(model).from_pretrained(tmp_path)
        described["table"]["settings"][name] = kept

"""``resize_token_embeddings`` on models with tied and with dense heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")

from embkern import freeze_table, resize_token_embeddings, unfreeze_table
from embkern.nn.base import CompressedEmbedding, CompressedHead
from tests.example_models import V, build, outputs
from tests.models.compressing import assert_shared, compressed, reload, round_as_stored

pytestmark = pytest.mark.usefixtures("quantizing")


@pytest.mark.parametrize("size", [V + 9, V - 30])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_resize(tmp_path, name, size, kind):
    model = compressed(build(name), kind)
    before, rows = outputs(model), model.get_input_embeddings().weight
    embedding = resize_token_embeddings(model, size)
    assert torch.equal(embedding.weight[: min(size, V)], rows[:size])
    assert outputs(model).shape[-1] == size
    assert_close(outputs(model)[..., : min(size, V)], before[..., :size], atol=1e-6, rtol=1e-5)
    over = [m for m in model.modules() if isinstance(m, (CompressedEmbedding, CompressedHead))]
    assert_shared(*over)
    if size > V:
        mean = rows.mean(0)
        error = (embedding.weight[-1] - mean).norm() / mean.norm()
        assert error <= (1e-6 if kind == "factors" else 5e-3)  # 8 bits, one scale: about 1e-3
        (adjustment,) = unfreeze_table(model).values()
        embedding(torch.tensor([size - 1])).sum().backward()
        assert next(adjustment.parameters()).grad[-1].any(), "it trains"
        freeze_table(model)
    loaded = reload(model, tmp_path)
    assert_close(outputs(loaded), outputs(round_as_stored(model)), atol=1e-6, rtol=1e-5)
    assert outputs(loaded.dequantize()).shape[-1] == size
    with pytest.raises(ValueError, match="num_embeddings: expected a positive integer, got 0"):
        resize_token_embeddings(model, 0)


def test_a_models_own_method_resizes_dense_and_compressed_tables(kind):
    dense, model = build("gpt2"), compressed(build("gpt2"), kind)
    for each in (dense, model):
        embedding = each.resize_token_embeddings(np.int64(V + 3), pad_to_multiple_of=8)
        assert embedding is each.get_input_embeddings()
        assert embedding.num_embeddings % 8 == 0
        assert outputs(each).shape[-1] == embedding.num_embeddings == each.config.vocab_size
    expected = embedding.num_embeddings
    assert model.resize_token_embeddings(None, 8, mean_resizing=False).num_embeddings == expected
    embedding = resize_token_embeddings(model, V, pad_to_multiple_of=np.int32(64))
    assert embedding.num_embeddings == -(-V // 64) * 64
    for number in (True, 8.0, "8", -8):
        with pytest.raises(ValueError, match="pad_to_multiple_of: expected a positive integer, got"):
            resize_token_embeddings(model, V, pad_to_multiple_of=number)


@pytest.mark.parametrize("name", ["llama-untied", "bart"])
@pytest.mark.parametrize("size", [V + 9, V - 30])
def test_resize_reaches_dense_heads_and_their_biases(tmp_path, name, size, kind):
    model = compressed(build(name), kind, lm_head="dense" if name == "bart" else "factorized")
    resize_token_embeddings(model, size)
    assert outputs(model).shape[-1] == size
    loaded = reload(model, tmp_path)
    assert_close(outputs(loaded), outputs(round_as_stored(model)), atol=1e-6, rtol=1e-5)

"""``embkern.resize_token_embeddings`` on models with one table, tied heads and heads of their own."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")

from embkern import resize_token_embeddings
from embkern.nn.base import CompressedEmbedding, CompressedHead
from tests.example_models import V, build, outputs
from tests.models.compressing import assert_shared, compressed, reload

pytestmark = pytest.mark.usefixtures("quantizing")


@pytest.mark.parametrize("size", [V + 9, V - 30])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_resize(tmp_path, name, size, kind):
    model = compressed(build(name), kind)
    with pytest.raises(TypeError, match=r"instance of .*Embedding"):
        model.resize_token_embeddings(size)
    before, rows = outputs(model), model.get_input_embeddings().weight
    embedding = resize_token_embeddings(model, size)
    assert torch.equal(embedding.weight[: min(size, V)], rows[:size])
    assert outputs(model).shape[-1] == size
    assert_close(outputs(model)[..., : min(size, V)], before[..., :size], atol=1e-6, rtol=1e-5)
    over = [m for m in model.modules() if isinstance(m, (CompressedEmbedding, CompressedHead))]
    assert_shared(*over)
    if size > V:
        near = dict(atol=1e-5, rtol=1e-4) if kind == "factors" else dict(atol=1e-3, rtol=0)
        assert_close(embedding.weight[-1], rows.mean(0), **near)
        embedding(torch.tensor([size - 1])).sum().backward()
        assert next(embedding.parameters()).grad[-1].any(), "it trains"
    loaded = reload(model, tmp_path)
    rounded = 0 if kind == "factors" else 1e-4  # the new rows' scale
    assert_close(outputs(loaded), outputs(model), atol=1e-6 + rounded, rtol=1e-5)
    assert outputs(loaded.dequantize()).shape[-1] == size
    with pytest.raises(ValueError, match="num_embeddings: expected a positive integer, got 0"):
        resize_token_embeddings(model, 0)


@pytest.mark.parametrize("name", ["llama-untied", "bart"])
@pytest.mark.parametrize("size", [V + 9, V - 30])
def test_resize_reaches_dense_heads_and_their_biases(tmp_path, name, size, kind):
    model = compressed(build(name), kind, lm_head="dense" if name == "bart" else "factorized")
    resize_token_embeddings(model, size)
    assert outputs(model).shape[-1] == size
    rounded = 0 if kind == "factors" else 1e-4
    assert_close(outputs(reload(model, tmp_path)), outputs(model), atol=1e-6 + rounded, rtol=1e-5)

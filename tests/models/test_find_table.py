"""Finding the table of a model: its scale, other tables, and models that cannot be compressed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

T = pytest.importorskip("transformers")

from embkern.models.find_table import UnsupportedModelError, find_table, other_tables, probe_scale
from tests.example_models import H, V, build, outputs
from tests.models.compressing import compressed

pytestmark = pytest.mark.usefixtures("quantizing")


def test_scaled_embeddings_are_measured():
    model = build("bart-scaled")
    table = find_table(model)
    assert table.embeddings == ["model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens"]
    assert [probe_scale(model.get_submodule(name)) for name in table.embeddings] == pytest.approx(
        [H**0.5] * 3, rel=1e-6
    )
    assert probe_scale(nn.Embedding(5, 4)) == 1.0
    assert probe_scale(nn.Embedding(5, 4, _weight=torch.zeros(5, 4))) == 1.0


def test_normalised_and_shifted_embeddings_are_refused():
    class Normalised(nn.Embedding):
        def forward(self, ids):
            return nn.functional.normalize(super().forward(ids), dim=-1)

    class Shifted(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) + 1

    for kind in (Normalised, Shifted):
        model = build("llama-untied")
        model.set_input_embeddings(kind(V, H))
        before = outputs(model)
        with pytest.raises(
            UnsupportedModelError, match=f"model.embed_tokens .{kind.__name__}. does not return a"
        ):
            compressed(model)
        assert torch.equal(outputs(model), before), "the model is unchanged"


def test_models_that_cannot_be_compressed_say_why():
    model = build("llama-untied")
    model.set_input_embeddings(nn.Embedding(V, H, max_norm=1.0))
    with pytest.raises(UnsupportedModelError, match="max_norm"):
        find_table(model)
    model.set_input_embeddings(nn.Linear(V, H))
    with pytest.raises(UnsupportedModelError, match="is Linear, expected nn.Embedding"):
        find_table(model)
    vision = T.ViTModel(
        T.ViTConfig(hidden_size=H, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    with pytest.raises(UnsupportedModelError, match="ViT"):
        find_table(vision)
    model.set_input_embeddings(nn.Embedding(V, H))
    model.model.embed_tokens.extra = nn.Parameter(torch.zeros(2, H))
    with pytest.raises(UnsupportedModelError, match=r"has parameters besides its table \(extra\)"):
        find_table(model)
    with pytest.raises(
        UnsupportedModelError, match="expected a transformers PreTrainedModel, got OptimizedModule"
    ):
        find_table(torch.compile(build("gpt2")))
    model = build("gpt2")
    model.hf_quantizer = type("Other", (), {"quantization_config": T.GPTQConfig(bits=4)})()
    with pytest.raises(UnsupportedModelError, match="already quantised by Other"):
        find_table(model)
    with pytest.raises(UnsupportedModelError, match="compressed already"):
        find_table(compressed(build("bert")))


def test_other_large_tables_are_reported():
    model = build("llama-untied")
    assert other_tables(model) == {}
    model.model.embed_tokens_per_layer = nn.Embedding(V, 4 * H)
    assert other_tables(model) == {"model.embed_tokens_per_layer": V * 4 * H * 4}

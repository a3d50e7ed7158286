"""Compressed language models as GGUF files: transformers reads back what was written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

T = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf", reason="needs embkern[interop]")

import embkern
from tests.example_models import build, outputs
from tests.models.compressing import compressed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quantizing")]
TYPES = {4: gguf.GGMLQuantizationType.Q4_0, 8: gguf.GGMLQuantizationType.Q8_0}
SIZES = dict(
    vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, max_position_embeddings=64,
)  # fmt: skip


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    if name == "qwen2":  # with biases
        return T.Qwen2ForCausalLM(T.Qwen2Config(**SIZES, tie_word_embeddings=True)).eval()
    if name == "qwen3":  # transformers takes the default width of a head for that of the file
        return T.Qwen3ForCausalLM(T.Qwen3Config(**SIZES, tie_word_embeddings=True, head_dim=128)).eval()
    return build(name)


@pytest.mark.parametrize("bits", TYPES)
@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "qwen2", "qwen3"])
def test_transformers_reads_the_file(tmp_path, name, kind, bits):
    model = compressed(model_of(name), kind)
    model.save_pretrained(tmp_path / "small")
    embkern.export_gguf(tmp_path / "small", tmp_path / "model.gguf", bits=bits)
    loaded = T.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert loaded.config.tie_word_embeddings == (name != "llama-untied")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert stored["token_embd.weight"].tensor_type == TYPES[bits]
    assert ("output.weight" in stored) == (name == "llama-untied")
    rows = torch.from_numpy(gguf.quants.dequantize(stored["token_embd.weight"].data, TYPES[bits]))
    model.dequantize()
    weight = model.get_input_embeddings().weight
    assert float((rows - weight).norm() / weight.norm()) < (0.15 if bits == 4 else 0.01)
    with torch.no_grad():
        weight.copy_(rows)
    assert_close(outputs(loaded), outputs(model), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("unseen", ["mean", "nearest"])
def test_rows_that_are_left_out_are_those_that_they_decode_to(tmp_path, unseen):
    model = model_of("llama-tied")
    counts = torch.zeros(101).index_fill(0, torch.arange(0, 101, 3), 1.0)
    embkern.compress(model, ratio=4, counts=counts, unseen=unseen, calibrate=False)
    model.save_pretrained(tmp_path / "small")
    embkern.export_gguf(tmp_path / "small", tmp_path / "model.gguf")
    loaded = T.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    rows, wanted = (each.get_input_embeddings().weight.detach() for each in (loaded, model))
    # Half of a step of Q8_0, of which the largest value of a block has 127, and scales in float16 twice.
    assert bool(((rows - wanted).abs() <= wanted.abs().amax(1, keepdim=True) / 190).all())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert", "model: expected a causal language model of type llama, qwen2, qwen3, got BertForMaskedLM"),
        ("gemma3", "model: expected a causal language model of type .*, got Gemma3ForCausalLM"),
    ],
)
def test_what_has_no_form_in_gguf_is_refused(tmp_path, name, message):
    compressed(build(name)).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=message):
        embkern.export_gguf(tmp_path / "small", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()

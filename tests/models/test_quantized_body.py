"""Compressed tables beside linear layers that torchao or bitsandbytes quantises: load, save, decode."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

T = pytest.importorskip("transformers")

import embkern
from embkern import EmbkernConfig, PackedEmbedding, PackedHead
from embkern.models.body_config import is_compressed, parse_body
from embkern.models.checkpoint import model_bytes
from embkern.models.find_table import UnsupportedModelError
from tests.example_models import V, outputs

slow = pytest.mark.slow
RATIO = 2


def build(tied: bool) -> T.PreTrainedModel:
    """A model with layers of 64 columns, the size of bitsandbytes' blocks."""
    torch.manual_seed(0)
    config = T.LlamaConfig(
        vocab_size=V, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return T.LlamaForCausalLM(config).eval()


def torchao() -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="needs embkern[interop]")
    return T.TorchAoConfig(quantization.Int8WeightOnlyConfig())


def bitsandbytes(**bits: Any) -> Any:
    pytest.importorskip("bitsandbytes", reason="needs embkern[interop]")
    return T.BitsAndBytesConfig(**bits)


BODIES = {
    "torchao int8": torchao,
    "bitsandbytes int8": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes nf4": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


@pytest.fixture(params=BODIES)
def body(request) -> Any:
    return BODIES[request.param]()


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def dense(request, tmp_path) -> str:
    """A directory with a dense model."""
    build(request.param).save_pretrained(tmp_path / "dense")
    return str(tmp_path / "dense")


def load(path, **options: Any) -> Any:
    model, info = T.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


def linear(model) -> torch.Tensor:
    return model.model.layers[0].self_attn.q_proj.weight


def test_a_model_that_another_library_quantised_is_not_compressed():
    model = build(tied=True)
    before = model_bytes(model)
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="torchao"))
    assert not is_compressed(model)
    assert model_bytes(model) == before


@slow
def test_a_quantised_body_keeps_its_quantiser_beside_a_table(dense, body, tmp_path):
    """Compress a model whose body is quantised; save, load, save again and decode the table."""
    model = load(dense, quantization_config=body)
    kind, own = type(linear(model)), type(model.hf_quantizer)
    assert kind is not torch.nn.Parameter
    report = embkern.compress(model, ratio=RATIO, calibrate=False)
    assert type(linear(model)) is kind
    saved = report.table_bytes - report.compressed_bytes
    assert report.model_bytes_before - report.model_bytes_after == saved
    model.save_pretrained(tmp_path / "pair")
    expected = outputs(model)  # on CPUs, bitsandbytes changes weights of 4 bits at their first use
    described = json.loads((tmp_path / "pair" / "config.json").read_text())["quantization_config"]
    assert described["quant_method"] == "embkern"
    assert described["format_version"] == 4
    assert described["body"]["quant_method"] == body.quant_method

    again = load(tmp_path / "pair")
    assert isinstance(again.get_input_embeddings(), PackedEmbedding)
    assert type(linear(again)) is kind
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(again), expected)
    assert torch.equal(outputs(load(tmp_path / "again")), expected)

    again.dequantize()
    assert type(again.hf_quantizer) is own
    assert again.config.quantization_config.quant_method == body.quant_method
    again.save_pretrained(tmp_path / "decoded")
    decoded = load(tmp_path / "decoded")
    assert type(decoded.get_input_embeddings()) is torch.nn.Embedding
    assert type(linear(decoded)) is kind


@slow
def test_one_config_compresses_and_quantises_while_loading(dense, body):
    once = load(dense, quantization_config=EmbkernConfig(ratio=RATIO, calibrate=False, body=body))
    twice = load(dense, quantization_config=body)
    embkern.compress(twice, ratio=RATIO, calibrate=False, counts=None)
    assert isinstance(once.get_input_embeddings(), PackedEmbedding)
    assert type(linear(once)) is type(linear(twice))
    # Both compress by the order of the ids: the model has no tokenizer.
    assert torch.equal(outputs(once), outputs(twice))


@slow
def test_the_body_of_a_compressed_model_is_quantised_while_loading(dense, body, tmp_path):
    model = load(dense)
    embkern.compress(model, ratio=RATIO, calibrate=False)
    model.save_pretrained(tmp_path / "small")
    config = T.AutoConfig.from_pretrained(tmp_path / "small")
    config.quantization_config["body"] = body
    pair = load(tmp_path / "small", config=config)
    expected = load(dense, quantization_config=EmbkernConfig(ratio=RATIO, calibrate=False, body=body))
    assert type(linear(pair)) is type(linear(expected))
    assert torch.equal(outputs(pair), outputs(expected))
    pair.save_pretrained(tmp_path / "pair")
    assert torch.equal(outputs(load(tmp_path / "pair")), outputs(pair))


@slow
def test_a_packed_head_stands_beside_a_quantised_body(tmp_path):
    build(tied=False).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", quantization_config=torchao())
    embkern.compress(model, tables={"input": RATIO, "lm_head": RATIO}, calibrate=False)
    model.save_pretrained(tmp_path / "pair")
    again = load(tmp_path / "pair")
    assert isinstance(again.lm_head, PackedHead)
    assert torch.equal(outputs(again), outputs(model))


@slow
def test_a_model_with_a_quantised_body_is_calibrated_on_its_own_samples(tmp_path):
    build(tied=True).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", quantization_config=torchao())
    report = embkern.compress(model, ratio=RATIO, calibrate=True)
    assert "own samples" in report.calibration


@slow
def test_a_quantised_head_is_refused(tmp_path):
    build(tied=False).save_pretrained(tmp_path / "dense")
    config = torchao()
    config.include_input_output_embeddings = True
    model = load(tmp_path / "dense", quantization_config=config)
    with pytest.raises(UnsupportedModelError, match="lm_head: its table is quantised already"):
        embkern.compress(model, tables={"lm_head": RATIO}, calibrate=False)


@pytest.mark.parametrize(
    "given", [T.HqqConfig, dict, lambda: {"quant_method": "gptq", "bits": 4}, lambda: "int8"]
)
def test_other_bodies_are_refused(given):
    with pytest.raises(
        ValueError, match="body: expected a config of transformers for bitsandbytes or torchao"
    ):
        parse_body(given() if given is not T.HqqConfig else T.GPTQConfig(bits=4))


def test_a_body_that_cannot_be_read_names_its_library():
    described = {"quant_method": "torchao", "quant_type": {"default": {"_type": "NoSuchConfig"}}}
    with pytest.raises(ValueError, match="for torchao cannot be read, which needs torchao to be installed"):
        EmbkernConfig(ratio=2, body=described)

"""Saving and loading through the quantizer of transformers, on many architectures."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch.testing import assert_close

T = pytest.importorskip("transformers")

from safetensors.torch import load_file

from embkern import EmbkernConfig, freeze_table, unfreeze_table
from embkern.nn.base import CompressedEmbedding, CompressedHead
from tests.example_models import MODELS, H, V, build, outputs
from tests.models.compressing import (
    RECIPES,
    UNTIED,
    assert_same_table,
    assert_shared,
    compressed,
    held,
    reload,
    round_as_stored,
)

pytestmark = pytest.mark.usefixtures("quantizing")


@pytest.mark.parametrize("lm_head", ["factorized", "dense"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(tmp_path, name, lm_head, kind):
    """Compressed in place, saved, reloaded, dequantised, saved and loaded; and compressed while loading."""
    model = build(name)
    model.save_pretrained(tmp_path / "dense")
    dense_kind = type(model.get_input_embeddings())
    compressed(model, kind, lm_head=lm_head)
    head = model.get_output_embeddings()
    assert isinstance(head, CompressedHead) == (name not in UNTIED and lm_head == "factorized")
    small = outputs(model)

    loaded = reload(model, tmp_path / "small")
    assert isinstance(loaded.get_input_embeddings(), CompressedEmbedding)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert_close(outputs(loaded), small, atol=1e-6, rtol=1e-5)

    if loaded.can_generate():
        prompt = torch.arange(3, 9).reshape(1, 6)
        out = loaded.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, min_new_tokens=3
        )
        assert out.shape[1] >= 4

    loaded.dequantize()
    assert type(loaded.get_input_embeddings()) is dense_kind
    assert not any(isinstance(m, (CompressedEmbedding, CompressedHead)) for m in loaded.modules())
    assert_close(outputs(loaded), small, atol=2e-6, rtol=1e-5)
    again = reload(loaded, tmp_path / "vanilla")
    assert "quantization_config" not in json.loads((tmp_path / "vanilla" / "config.json").read_text())
    assert_close(outputs(again), small, atol=2e-6, rtol=1e-5)

    config = EmbkernConfig(**RECIPES[kind], lm_head=lm_head)
    on_the_fly = type(model).from_pretrained(tmp_path / "dense", quantization_config=config)
    assert_close(outputs(on_the_fly), small, atol=1e-6, rtol=1e-5)
    assert_close(outputs(reload(on_the_fly, tmp_path / "fly")), small, atol=1e-6, rtol=1e-5)


def test_a_saved_model_holds_the_table_once(tmp_path, kind):
    model = compressed(build("t5"), kind)
    model.save_pretrained(tmp_path)
    tensors = model.get_input_embeddings().tensors()
    names = [n for n in load_file(tmp_path / "model.safetensors") if n.rpartition(".")[2] in tensors]
    assert sorted(names) == sorted(f"shared.{name}" for name in tensors)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "bart"])
def test_ties_hold_after_loading_and_training(tmp_path, name, kind):
    model = reload(compressed(build(name), kind), tmp_path)
    over = [m for m in model.modules() if isinstance(m, (CompressedEmbedding, CompressedHead))]
    embedding = model.get_input_embeddings()
    assert model.get_output_embeddings() in over
    assert_shared(*over)
    model.tie_weights()
    assert_shared(*over)
    before = {name: tensor.clone() for name, tensor in held(embedding).items()}
    unfreeze_table(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    ids = torch.arange(3, 21).reshape(2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert_shared(*over)
    freeze_table(model)
    for name, tensor in held(embedding).items():
        assert torch.equal(before[name], tensor) != tensor.is_floating_point(), name
    again = reload(model, tmp_path / "trained")
    round_as_stored(model)
    assert_same_table(again.get_input_embeddings(), embedding)
    assert_close(outputs(again), outputs(model), atol=1e-6, rtol=1e-5)


def test_a_checkpoint_loads_into_another_head(tmp_path, kind):
    model = compressed(build("bert"), kind)
    model.save_pretrained(tmp_path)
    for other in (T.BertModel, T.BertForSequenceClassification):
        loaded = other.from_pretrained(tmp_path)
        assert_same_table(loaded.get_input_embeddings(), model.get_input_embeddings())
    compressed(build("bert-backbone"), kind).save_pretrained(tmp_path / "backbone")
    other = T.BertForMaskedLM.from_pretrained(tmp_path / "backbone")
    assert isinstance(other.get_output_embeddings(), CompressedHead)
    assert_shared(other.get_output_embeddings(), other.get_input_embeddings())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(tmp_path, dtype):
    build("gemma3").to(dtype).save_pretrained(tmp_path / "dense")
    dense = T.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")  # its rotary buffers stay in fp32
    full = compressed(copy.deepcopy(dense), rank=H, options={})
    # Rounding codes, basis and rows contributes up to eps / 2 each to the rows, in the norm.
    table, rows = (model.get_input_embeddings().weight.double() for model in (dense, full))
    assert ((rows - table).norm(dim=1) <= 1.5 * torch.finfo(dtype).eps * table.norm(dim=1)).all()
    # The rest of the model adds the rounding errors that the dense one has.
    ours, native = (
        (outputs(model) - outputs(copy.deepcopy(model).double())).abs().max() for model in (full, dense)
    )
    assert ours <= 2 * native
    assert full.get_input_embeddings().scale == pytest.approx(H**0.5, rel=1e-6)
    loaded = reload(full, tmp_path / "small")
    assert loaded.dtype == dtype
    assert_same_table(loaded.get_input_embeddings(), full.get_input_embeddings())
    assert torch.equal(outputs(loaded), outputs(full))
    wider = type(full).from_pretrained(tmp_path / "small", dtype=torch.float32)
    assert wider.get_input_embeddings().codes.dtype == torch.float32


def test_dtype_moves_copies_and_pickles_of_a_loaded_model(tmp_path, kind):
    model = reload(compressed(build("llama-tied"), kind), tmp_path)
    expected = outputs(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(other), expected)
        assert_shared(other.get_output_embeddings(), other.get_input_embeddings())
        other.dequantize()
        assert_close(outputs(other), expected, atol=2e-6, rtol=1e-5)
    assert model.half().float().dtype == torch.float32


def test_trainer_accepts_a_loaded_model(tmp_path, kind):
    pytest.importorskip("accelerate")
    model = reload(compressed(build("gpt2"), kind), tmp_path / "small")
    ids = torch.arange(3, 21).reshape(2, 9)
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = T.TrainingArguments(
        tmp_path / "run", max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    unfreeze_table(model)
    before = model.get_input_embeddings().weight.detach().clone()
    trainer = T.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    assert not torch.equal(before, model.get_input_embeddings().weight)
    trainer.save_model(tmp_path / "out")
    freeze_table(model)
    round_as_stored(model).eval()
    again = T.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert_close(outputs(again), outputs(model), atol=1e-6, rtol=1e-5)


def test_a_backbone_loaded_under_a_head_has_a_zero_bias(tmp_path, kind):
    backbone = T.DistilBertModel(build("distilbert").config)
    compressed(backbone, kind).save_pretrained(tmp_path)
    for _ in range(3):  # uninitialised memory is often zero
        torch.full((V,), float("nan"))
        model = T.DistilBertForMaskedLM.from_pretrained(tmp_path)
        assert not model.get_output_embeddings().bias.any()


@pytest.mark.parametrize("name", ["bert", "roberta", "albert", "gpt2", "llama-tied", "bart", "m2m100"])
def test_a_tie_flag_that_an_adapter_cleared_is_restored(tmp_path, name, kind):
    """PEFT's merge_and_unload compares dense weights, finds none, and clears tie_word_embeddings."""
    model = compressed(build(name), kind)
    expected = outputs(model)
    model.save_pretrained(tmp_path / "before")
    model.config.tie_word_embeddings = False
    assert_close(outputs(reload(model, tmp_path / "after")), expected, atol=1e-6, rtol=1e-5)
    config = json.loads((tmp_path / "before" / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "before" / "config.json").write_text(json.dumps(config))
    loaded, info = type(model).from_pretrained(tmp_path / "before", output_loading_info=True)
    assert not any(info.values())
    assert_close(outputs(loaded), expected, atol=1e-6, rtol=1e-5)
    loaded.config.tie_word_embeddings = False
    vanilla = reload(loaded.dequantize(), tmp_path / "vanilla")
    assert_close(outputs(vanilla), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert", "bart", "t5", "gpt2"])
def test_a_nested_model_saves_alone_after_training(tmp_path, name, kind):
    model = compressed(build(name), kind)
    with torch.no_grad():
        next(model.get_input_embeddings().parameters()).mul_(1.5)
    backbone = model.base_model
    if backbone is model:
        backbone = model.get_encoder()
    backbone.save_pretrained(tmp_path)
    loaded = type(backbone).from_pretrained(tmp_path)
    assert_same_table(loaded.get_input_embeddings(), round_as_stored(model).get_input_embeddings())


def test_merging_an_adapter_keeps_the_table(tmp_path, kind):
    peft = pytest.importorskip("peft")
    model = compressed(build("llama-tied"), kind)
    expected = outputs(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    merged = adapted.merge_and_unload()
    assert_close(outputs(merged), expected, atol=1e-6, rtol=1e-5)
    assert_close(outputs(reload(merged, tmp_path)), expected, atol=1e-6, rtol=1e-5)


def test_other_checkpoint_formats_and_shards(tmp_path, kind):
    model = compressed(build("gpt2"), kind)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert_close(
        outputs(T.GPT2LMHeadModel.from_pretrained(tmp_path / "shards")), outputs(model), atol=1e-6, rtol=1e-5
    )
    model.save_pretrained(tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    assert_close(
        outputs(T.GPT2LMHeadModel.from_pretrained(tmp_path / "bin")), outputs(model), atol=1e-6, rtol=1e-5
    )


def test_the_elu_variant_survives_a_reload(tmp_path):
    model = compressed(
        build("bert-backbone"), method="autoencoder", options={"activation": "elu", "epochs": 1}
    )
    assert_close(outputs(reload(model, tmp_path)), outputs(model))
    with pytest.raises(ValueError, match="has a tied head, which cannot decode through .* activation 'elu'"):
        T.BertForMaskedLM.from_pretrained(tmp_path)

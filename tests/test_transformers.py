"""The transformers integration: compress, save, reload, go back, on many architectures."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

T = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from embkern import EmbkernConfig, FactorizedEmbedding, FactorizedHead, Recipe, resize_token_embeddings
from embkern.model_table import UnsupportedModelError, find_table, other_tables, probe_scale
from embkern.transformers import install

from .models import MODELS, H, V, build, outputs

UNTIED = {"bert-backbone", "llama-untied", "gpt-neox"}


def compressed(model, **recipe):
    recipe = Recipe.parse(**{"method": "svd", "rank": 7, "options": {"center": True}, **recipe})
    table = find_table(model)
    install(model, table, recipe.factorize(table.weight.detach()), recipe)
    return model


def reload(model, path, **kwargs):
    """Save and load; no key may be missing, unexpected or mismatched."""
    model.save_pretrained(path)
    loaded, info = type(model).from_pretrained(path, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return loaded


@pytest.mark.parametrize("lm_head", ["factorized", "dense"])
@pytest.mark.parametrize("name", MODELS)
def test_full_rank_equals_the_dense_model(name, lm_head):
    model = build(name)
    expected, width = outputs(model), model.get_input_embeddings().embedding_dim
    compressed(model, rank=width, lm_head=lm_head, options={})
    assert_close(outputs(model), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("lm_head", ["factorized", "dense"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(tmp_path, name, lm_head):
    """In place, saved, reloaded, dequantised, saved and loaded again; and the same on the fly."""
    model = build(name)
    model.save_pretrained(tmp_path / "dense")
    dense_kind = type(model.get_input_embeddings())
    compressed(model, lm_head=lm_head)
    head = model.get_output_embeddings()
    assert isinstance(head, FactorizedHead) == (name not in UNTIED and lm_head == "factorized")
    small = outputs(model)

    loaded = reload(model, tmp_path / "small")
    assert isinstance(loaded.get_input_embeddings(), FactorizedEmbedding)
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
    assert not any(isinstance(m, (FactorizedEmbedding, FactorizedHead)) for m in loaded.modules())
    assert_close(outputs(loaded), small, atol=2e-6, rtol=1e-5)
    again = reload(loaded, tmp_path / "vanilla")
    assert "quantization_config" not in json.loads((tmp_path / "vanilla" / "config.json").read_text())
    assert_close(outputs(again), small, atol=2e-6, rtol=1e-5)

    config = EmbkernConfig(method="svd", rank=7, lm_head=lm_head, options={"center": True})
    on_the_fly = type(model).from_pretrained(tmp_path / "dense", quantization_config=config)
    assert_close(outputs(on_the_fly), small, atol=1e-6, rtol=1e-5)
    assert_close(outputs(reload(on_the_fly, tmp_path / "fly")), small, atol=1e-6, rtol=1e-5)


def test_a_saved_model_holds_the_factors_once(tmp_path):
    compressed(build("t5")).save_pretrained(tmp_path)
    names = [
        name
        for name in load_file(tmp_path / "model.safetensors")
        if name.rpartition(".")[2] in ("codes", "basis")
    ]
    assert sorted(names) == ["shared.basis", "shared.codes"]


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "bart"])
def test_ties_hold_after_loading_and_training(tmp_path, name):
    model = reload(compressed(build(name)), tmp_path)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.codes is embedding.codes
    model.tie_weights()
    assert head.codes is embedding.codes
    before = embedding.codes.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    ids = torch.arange(3, 21).reshape(2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(before, embedding.codes)
    trained = outputs(model)
    assert_close(outputs(reload(model, tmp_path / "trained")), trained, atol=1e-6, rtol=1e-5)


def test_a_checkpoint_loads_into_another_head(tmp_path):
    model = compressed(build("bert"))
    model.save_pretrained(tmp_path)
    codes = model.get_input_embeddings().codes
    for kind in (T.BertModel, T.BertForSequenceClassification):
        assert torch.equal(kind.from_pretrained(tmp_path).get_input_embeddings().codes, codes)
    compressed(build("bert-backbone")).save_pretrained(tmp_path / "backbone")
    other = T.BertForMaskedLM.from_pretrained(tmp_path / "backbone")
    assert isinstance(other.get_output_embeddings(), FactorizedHead)
    assert other.get_output_embeddings().codes is other.get_input_embeddings().codes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(tmp_path, dtype):
    model = build("gemma3").to(dtype)
    expected = outputs(model)
    full = compressed(copy.deepcopy(model), rank=H, options={})
    assert_close(outputs(full), expected, atol=0.1, rtol=0.1)
    assert full.get_input_embeddings().scale == pytest.approx(H**0.5, rel=1e-6)
    loaded = reload(full, tmp_path)
    assert loaded.dtype == dtype
    assert torch.equal(loaded.get_input_embeddings().codes, full.get_input_embeddings().codes)
    assert_close(outputs(loaded), outputs(full), atol=1e-2, rtol=0)  # .to(dtype) rounds rotary buffers too
    wider = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert wider.get_input_embeddings().codes.dtype == torch.float32


def test_dtype_moves_copies_and_pickles_of_a_loaded_model(tmp_path):
    model = reload(compressed(build("llama-tied")), tmp_path)
    expected = outputs(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(other), expected)
        assert other.get_output_embeddings().codes is other.get_input_embeddings().codes
        other.dequantize()
        assert_close(outputs(other), expected, atol=2e-6, rtol=1e-5)
    assert model.half().float().dtype == torch.float32


def test_trainer_accepts_a_loaded_model(tmp_path):
    pytest.importorskip("accelerate")
    model = reload(compressed(build("gpt2")), tmp_path / "small")
    ids = torch.arange(3, 21).reshape(2, 9)
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = T.TrainingArguments(
        tmp_path / "run", max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    before = model.get_input_embeddings().codes.detach().clone()
    trainer = T.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    assert not torch.equal(before, model.get_input_embeddings().codes)
    trainer.save_model(tmp_path / "out")
    model.eval()
    assert_close(
        outputs(T.GPT2LMHeadModel.from_pretrained(tmp_path / "out")), outputs(model), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("size", [V + 9, V - 30])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_resize(tmp_path, name, size):
    model = compressed(build(name))
    with pytest.raises(TypeError, match=r"instance of .*Embedding"):
        model.resize_token_embeddings(size)
    before = outputs(model)
    resize_token_embeddings(model, size)
    assert outputs(model).shape[-1] == size
    assert_close(outputs(model)[..., : min(size, V)], before[..., :size], atol=1e-6, rtol=1e-5)
    if size > V:
        mean = model.get_input_embeddings().weight[:V].mean(0)
        assert_close(model.get_input_embeddings().weight[-1], mean, atol=1e-5, rtol=1e-4)
    loaded = reload(model, tmp_path)
    assert_close(outputs(loaded), outputs(model), atol=1e-6, rtol=1e-5)
    assert outputs(loaded.dequantize()).shape[-1] == size
    with pytest.raises(ValueError, match="num_embeddings: expected a positive integer, got 0"):
        resize_token_embeddings(model, 0)


def test_a_backbone_loaded_under_a_head_has_a_zero_bias(tmp_path):
    backbone = T.DistilBertModel(build("distilbert").config)
    compressed(backbone).save_pretrained(tmp_path)
    for _ in range(3):  # uninitialised memory is often zero by chance
        torch.full((V,), float("nan"))
        model = T.DistilBertForMaskedLM.from_pretrained(tmp_path)
        assert not model.get_output_embeddings().bias.any()


@pytest.mark.parametrize("name", ["bert", "roberta", "albert", "gpt2", "llama-tied", "bart", "m2m100"])
def test_a_tie_flag_that_an_adapter_cleared_is_restored(tmp_path, name):
    """PEFT's merge_and_unload compares dense weights, finds none, and clears tie_word_embeddings."""
    model = compressed(build(name))
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
def test_a_nested_model_saves_alone_after_training(tmp_path, name):
    model = compressed(build(name))
    with torch.no_grad():
        model.get_input_embeddings().codes.mul_(1.5)
    backbone = model.base_model
    if backbone is model:
        backbone = model.get_encoder()
    backbone.save_pretrained(tmp_path)
    loaded = type(backbone).from_pretrained(tmp_path)
    assert torch.equal(loaded.get_input_embeddings().codes, model.get_input_embeddings().codes)


def test_dequantize_after_saving_and_after_a_cast(tmp_path):
    model = compressed(build("gpt2"))
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


def test_hooks_of_the_embedding_are_kept():
    model = build("gpt2")
    model.enable_input_require_grads()
    compressed(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert model.transformer.wte(torch.tensor([3])).requires_grad
    model.disable_input_require_grads()
    assert not model.transformer.wte(torch.tensor([3])).requires_grad


def test_other_checkpoint_formats_and_shards(tmp_path):
    model = compressed(build("gpt2"))
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


@pytest.mark.parametrize("name", ["bert", "bart", "gpt2"])
def test_a_compressed_model_compiles(name):
    model = compressed(build(name))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert_close(outputs(compiled), outputs(model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama-untied", "bart"])
@pytest.mark.parametrize("size", [V + 9, V - 30])
def test_resize_reaches_dense_heads_and_their_biases(tmp_path, name, size):
    model = compressed(build(name), lm_head="dense" if name == "bart" else "factorized")
    resize_token_embeddings(model, size)
    assert outputs(model).shape[-1] == size
    assert_close(outputs(reload(model, tmp_path)), outputs(model), atol=1e-6, rtol=1e-5)


# ---- finding the table and its scale ---------------------------------------------------------------------


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
    model.hf_quantizer = type("Other", (), {"quantization_config": T.BitsAndBytesConfig()})()
    with pytest.raises(UnsupportedModelError, match="is quantised by Other already"):
        find_table(model)
    with pytest.raises(UnsupportedModelError, match="compressed already"):
        find_table(compressed(build("bert")))


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


def test_the_elu_variant_survives_a_reload(tmp_path):
    model = compressed(
        build("bert-backbone"), method="autoencoder", options={"activation": "elu", "epochs": 1}
    )
    assert_close(outputs(reload(model, tmp_path)), outputs(model))
    with pytest.raises(ValueError, match="has a tied head, which cannot decode through .* activation 'elu'"):
        T.BertForMaskedLM.from_pretrained(tmp_path)


def test_other_large_tables_are_reported():
    model = build("llama-untied")
    assert other_tables(model) == {}
    model.model.embed_tokens_per_layer = nn.Embedding(V, 4 * H)
    assert other_tables(model) == {"model.embed_tokens_per_layer": V * 4 * H * 4}


# ---- damaged files -----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    compressed(build("bert-backbone")).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def edit(path: Path, change) -> None:
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["table"].update(rank=6), "does not hold the compressed table its config describes"),
        (lambda c: c["table"].update(rank=0), "rank: expected a positive integer, got 0"),
        (lambda c: c["table"].update(rank=99), "rank: expected at most 32, got 99"),
        (lambda c: c["table"].update(rank="7"), "rank: expected a positive integer, got '7'"),
        (
            lambda c: c["table"].update(num_embeddings=100),
            "describes 100 x 32, the model's config says 101 x 32",
        ),
        (lambda c: c["table"].update(offset=False), "does not hold the compressed table"),
        (lambda c: c["table"].pop("dtype"), "quantization_config.table is damaged"),
        (
            lambda c: c["table"].update(dtype="float31"),
            "dtype: expected a floating-point torch dtype, got 'float31'",
        ),
        (lambda c: c["table"].update(activation="relu"), "activation"),
        (lambda c: c["table"].update(head="half"), "head: expected factorized, dense or null"),
        (lambda c: c["table"].update(scales={"x": "a"}), "scales: expected finite numbers"),
        (lambda c: c["table"].update(checksums={"codes": "crc32:0"}), "codes was changed after it was saved"),
        (lambda c: c["table"].update(scales={"x": float("nan")}), "scales: expected finite numbers"),
        (lambda c: c["table"].update(rank=True), "rank: expected a positive integer, got True"),
        (lambda c: c["table"].update(dtype="int64"), "dtype: expected a floating-point torch dtype"),
        (lambda c: c["table"].update(checksums={"decoder": "x"}), "checksums: expected them of codes, basis"),
        (lambda c: c["table"].update(checksums=None), "quantization_config.table is damaged"),
        (lambda c: c.pop("table"), "quantization_config.table: expected what embkern saved"),
        (lambda c: c.update(surprise=1), "unknown field.s. surprise"),
        (lambda c: c.update(format_version=2), "format_version: expected 1, got 2"),
        (lambda c: c.update(method="magic"), "method: .* got 'magic'"),
    ],
)
def test_an_edited_config_is_refused(saved, change, message):
    edit(saved / "config.json", change)
    with pytest.raises(ValueError, match=message):
        T.BertModel.from_pretrained(saved)


def test_a_truncated_or_edited_checkpoint_is_refused(saved):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    tensors = {key: value.clone() for key, value in load_file(path).items()}  # not a map of what is rewritten
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        T.BertModel.from_pretrained(saved)
    name = "embeddings.word_embeddings.codes"
    save_file({**tensors, name: tensors[name] + 1}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="codes was changed after it was saved"):
        T.BertModel.from_pretrained(saved)
    save_file({key: value for key, value in tensors.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="does not hold the compressed table"):
        T.BertModel.from_pretrained(saved)

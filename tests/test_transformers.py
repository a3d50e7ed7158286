"""The transformers integration: compress, save, reload, go back, on many architectures."""

from __future__ import annotations

import copy
import json
import pickle
import random
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

T = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from embkern import EmbkernConfig, Recipe, resize_token_embeddings
from embkern.models.checkpoint import stored_table
from embkern.models.find_table import UnsupportedModelError, find_table, other_tables, probe_scale
from embkern.models.loading import load_model
from embkern.models.quantizer import install
from embkern.nn.base import CompressedEmbedding, CompressedHead

from .models import MODELS, H, V, build, outputs
from .tables import quantizing  # noqa: F401 (a fixture)

UNTIED = {"bert-backbone", "llama-untied", "gpt-neox"}
RECIPES = {
    "factors": {"method": "svd", "rank": 7, "options": {"center": True}},
    "packed": {"method": "quantize", "ratio": 2},
}

pytestmark = pytest.mark.usefixtures("quantizing")


@pytest.fixture(params=RECIPES)
def kind(request) -> str:
    return request.param


def compressed(model, kind="factors", **recipe):
    recipe = Recipe.parse(**{**RECIPES[kind], **recipe})
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


def held(module) -> dict[str, torch.Tensor]:
    """The tensors of a table that a module holds."""
    return {name: getattr(module, name) for name in module.tensors()}


def assert_shared(*modules) -> None:
    for name, tensor in held(modules[0]).items():
        assert all(getattr(module, name) is tensor for module in modules), name


def assert_same_table(got, expected) -> None:
    assert held(got).keys() == held(expected).keys()
    for name, tensor in held(expected).items():
        assert torch.equal(getattr(got, name), tensor), name


@pytest.mark.parametrize("lm_head", ["factorized", "dense"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(tmp_path, name, lm_head, kind):
    """In place, saved, reloaded, dequantised, saved and loaded again; and the same on the fly."""
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
    before = {name: tensor.detach().clone() for name, tensor in held(embedding).items()}
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    ids = torch.arange(3, 21).reshape(2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for name, tensor in held(embedding).items():
        assert torch.equal(before[name], tensor) != tensor.is_floating_point(), name
    trained = outputs(model)
    rounded = 0 if kind == "factors" else 1e-2  # a packed table is saved in fp16
    again = reload(model, tmp_path / "trained")
    assert_close(outputs(again), trained, atol=1e-6 + rounded, rtol=1e-5)
    assert_close(held(again.get_input_embeddings()), held(embedding), atol=rounded / 1e4, rtol=rounded / 10)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packed_tables_are_stored_in_16_bits_and_come_back_to_the_same_bytes(tmp_path, dtype):
    model = compressed(build("gemma3").to(dtype), "packed")
    stored = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    nbytes = stored_table(model).nbytes
    assert (stored_table(model).dtype, model.get_input_embeddings().dtype) == (stored, dtype)
    loaded = reload(model, tmp_path / "first")
    assert (loaded.dtype, loaded.get_input_embeddings().dtype) == (dtype, dtype)
    assert_same_table(loaded.get_input_embeddings(), model.get_input_embeddings())
    file = load_file(tmp_path / "first" / "model.safetensors")
    table = {n: t for n, t in file.items() if n.startswith("model.embed_tokens.")}
    assert sum(t.nbytes for t in table.values()) == nbytes
    assert {t.dtype for t in table.values() if t.is_floating_point()} == {stored}
    loaded.save_pretrained(tmp_path / "second")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    wider = type(model).from_pretrained(tmp_path / "first", dtype=torch.float32)
    assert wider.get_input_embeddings().dtype == torch.float32
    wider.save_pretrained(tmp_path / "wider")
    for name, tensor in load_file(tmp_path / "wider" / "model.safetensors").items():
        assert name not in table or torch.equal(tensor, table[name]), name


def test_values_that_do_not_fit_what_is_stored_are_refused(tmp_path):
    model = compressed(build("bert"), "packed")
    with torch.no_grad():
        model.get_input_embeddings().scales[3] = 1e6
    with pytest.raises(ValueError, match="scales: expected values within torch.float16"):
        model.save_pretrained(tmp_path)


def test_casts_leave_the_codes_alone():
    model = compressed(build("gpt2"), "packed")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    before = {name: tensor.clone() for name, tensor in held(embedding).items()}
    for cast in (model.half, model.bfloat16, model.double):
        cast()
        assert_shared(embedding, head)
        for name, tensor in held(embedding).items():
            if not before[name].is_floating_point():
                assert torch.equal(tensor, before[name]), name
                assert tensor.dtype == before[name].dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(tmp_path, dtype):
    model = build("gemma3").to(dtype)
    expected = outputs(model)
    full = compressed(copy.deepcopy(model), rank=H, options={})
    assert_close(outputs(full), expected, atol=0.1, rtol=0.1)
    assert full.get_input_embeddings().scale == pytest.approx(H**0.5, rel=1e-6)
    loaded = reload(full, tmp_path)
    assert loaded.dtype == dtype
    assert_same_table(loaded.get_input_embeddings(), full.get_input_embeddings())
    assert_close(outputs(loaded), outputs(full), atol=1e-2, rtol=0)  # .to(dtype) rounds rotary buffers too
    wider = type(model).from_pretrained(tmp_path, dtype=torch.float32)
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
    before = model.get_input_embeddings().weight.detach()
    trainer = T.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    assert not torch.equal(before, model.get_input_embeddings().weight)
    trainer.save_model(tmp_path / "out")
    model.eval()
    again = T.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert_close(outputs(again), outputs(model), atol=1e-6 if kind == "factors" else 1e-3, rtol=1e-5)


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


def test_a_backbone_loaded_under_a_head_has_a_zero_bias(tmp_path, kind):
    backbone = T.DistilBertModel(build("distilbert").config)
    compressed(backbone, kind).save_pretrained(tmp_path)
    for _ in range(3):  # uninitialised memory is often zero by chance
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
    near = dict(atol=0, rtol=0 if kind == "factors" else 1e-3)
    assert_close(held(loaded.get_input_embeddings()), held(model.get_input_embeddings()), **near)


def test_dequantize_after_saving_and_after_a_cast(tmp_path, kind):
    model = compressed(build("gpt2"), kind)
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


def test_hooks_of_the_embedding_are_kept(kind):
    model = build("gpt2")
    model.enable_input_require_grads()
    compressed(model, kind)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert model.transformer.wte(torch.tensor([3])).requires_grad
    model.disable_input_require_grads()
    assert not model.transformer.wte(torch.tensor([3])).requires_grad


def test_gradient_checkpointing_gives_the_same_gradients(kind):
    model = compressed(build("llama-tied"), kind).train()
    ids = torch.arange(3, 21).reshape(2, 9)
    grads = []
    for _ in range(2):
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        model.gradient_checkpointing_enable()
    assert_close(grads[0], grads[1])
    assert all(grad is not None for grad in grads[0].values())


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


@pytest.mark.parametrize("name", ["bert", "bart", "gpt2"])
def test_a_compressed_model_compiles(name, kind):
    model = compressed(build(name), kind)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert_close(outputs(compiled), outputs(model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama-untied", "bart"])
@pytest.mark.parametrize("size", [V + 9, V - 30])
def test_resize_reaches_dense_heads_and_their_biases(tmp_path, name, size, kind):
    model = compressed(build(name), kind, lm_head="dense" if name == "bart" else "factorized")
    resize_token_embeddings(model, size)
    assert outputs(model).shape[-1] == size
    rounded = 0 if kind == "factors" else 1e-4
    assert_close(outputs(reload(model, tmp_path)), outputs(model), atol=1e-6 + rounded, rtol=1e-5)


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


@pytest.fixture
def saved_packed(tmp_path) -> Path:
    compressed(build("bert-backbone"), "packed").save_pretrained(tmp_path / "p")
    return tmp_path / "p"


def edit(path: Path, change) -> None:
    """Change a saved config, as the first version has it: later ones notice any change by their checksum."""
    config = json.loads(path.read_text())
    config["quantization_config"].pop("checksum", None)
    config["quantization_config"]["format_version"] = 1
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def shape(name: str, *sizes):
    return lambda config: config["table"]["shapes"].update({name: list(sizes)})


def of_table(**fields):
    return lambda config: config["table"].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["table"]["shapes"].update(codes=[V, 6], basis=[6, H]),
            "does not hold the compressed table its config describes",
        ),
        (shape("codes", V, 0), "shapes: expected positive integers, got .101, 0. of codes"),
        (shape("codes", V, "7"), "shapes: expected positive integers, got .101, '7'. of codes"),
        (shape("codes", V, True), "shapes: expected positive integers, got .101, True. of codes"),
        (shape("codes", V, 9), r"codes, basis: expected shapes .V, r. and .r, H., got .101, 9. and .7, 32."),
        (shape("codes", 100, 7), "describes 100 x 32, the model's config says 101 x 32"),
        (shape("surprise", 3), "quantization_config.table is damaged: .*surprise"),
        (of_table(shapes=3), "quantization_config.table is damaged"),
        (lambda c: c["table"]["shapes"].pop("offset"), "checksums: expected them of basis, codes, got"),
        (of_table(kind="folded"), "kind: expected one of factors, packed, got 'folded'"),
        (of_table(settings={"depth": 3}), "quantization_config.table is damaged: .*depth"),
        (lambda c: c["table"].pop("dtype"), "quantization_config.table is damaged"),
        (of_table(dtype="float31"), "dtype: expected a floating-point torch dtype .*, got 'float31'"),
        (of_table(settings={"activation": "relu"}), "activation"),
        (of_table(head="half"), "head: expected factorized, dense or null"),
        (of_table(scales={"x": "a"}), "scales: expected finite numbers"),
        (of_table(checksums={"codes": "crc32:0"}), "codes was changed after it was saved"),
        (of_table(scales={"x": float("nan")}), "scales: expected finite numbers"),
        (of_table(dtype="int64"), "dtype: expected a floating-point torch dtype"),
        (of_table(checksums={"decoder": "x"}), "checksums: expected them of basis, codes, offset"),
        (of_table(checksums={"codes": ["crc32:0"]}), "checksums: expected them of basis, codes, offset"),
        (of_table(checksums=None), "quantization_config.table is damaged"),
        (lambda c: c.pop("table"), "quantization_config.table: expected what embkern saved"),
        (lambda c: c.update(surprise=1), "unknown field.s. surprise"),
        (lambda c: c.update(format_version=3), "format_version: expected 1 or 2, got 3"),
        (
            lambda c: c.update(format_version=2),
            "quantization_config was changed after it was saved .expected None",
        ),
        (lambda c: c.update(method="magic"), "method: .* got 'magic'"),
    ],
)
def test_an_edited_config_is_refused(saved, change, message):
    edit(saved / "config.json", change)
    with pytest.raises(ValueError, match=message):
        T.BertModel.from_pretrained(saved)


def test_a_changed_value_of_a_saved_config_is_noticed(saved):
    path = saved / "config.json"
    whole = path.read_text()
    for old, new in (
        ('"embeddings.word_embeddings": 1.0', '"embeddings.word_embeddings": 3.0'),
        ('"lm_head": "factorized"', '"lm_head": "dense"'),
        ('"rank": 7', '"rank": 6'),
        ('"checksum": "crc32:', '"checksum": "crc32:0'),
        ('"checksum"', '"checksun"'),
    ):
        assert old in whole
        path.write_text(whole.replace(old, new))
        for load in (T.BertModel.from_pretrained, load_model):
            with pytest.raises(ValueError, match="quantization_config was changed|unknown field.s. checksun"):
                load(saved)
    path.write_text(whole)
    load_model(saved)


def test_a_flipped_bit_of_a_description_is_noticed(saved):
    path, draw = saved / "config.json", random.Random(0)
    whole = path.read_bytes()
    start = whole.index(b'"quantization_config"')
    stop = whole.index(b'"shapes"', start)
    for at in draw.sample(range(start, stop), 40):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="model: .* cannot be loaded: "):
            load_model(saved)


@pytest.mark.parametrize(
    "value", [[[[]]], "[" * 10**5 + "]" * 10**5, 2**62, None, {"a": {}}], ids=lambda v: str(v)[:9]
)
def test_what_transformers_cannot_print_is_refused_by_name(saved, value):
    path = saved / "config.json"
    edit(path, of_table(dtype="here"))
    text = value if isinstance(value, str) else json.dumps(value)
    path.write_text(path.read_text().replace('"here"', text))
    with pytest.raises(ValueError, match=f"{path}.*(dtype: expected|nested too deep)"):
        load_model(saved)


def test_what_is_saved_twice_has_the_same_bytes(tmp_path, kind):
    model = compressed(build("bert"), kind)
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
    reload_ = T.BertForMaskedLM.from_pretrained(tmp_path / "first")
    reload_.save_pretrained(tmp_path / "again")
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert {"config.json", "model.safetensors"} <= names
    for name in names:
        first = (tmp_path / "first" / name).read_bytes()
        assert first == (tmp_path / "second" / name).read_bytes()
        assert first == (tmp_path / "again" / name).read_bytes()


def test_models_saved_before_there_were_kinds_of_tables_load(saved):
    expected = outputs(T.BertModel.from_pretrained(saved))

    def as_it_was(config):
        table = config["table"]
        shapes = table.pop("shapes")
        codes, basis = shapes["codes"], shapes["basis"]
        first = dict(num_embeddings=codes[0], embedding_dim=basis[1], rank=codes[1], offset=True)
        config["table"] = {**first, **table.pop("settings"), **table}
        assert config["table"].pop("kind") == "factors"

    edit(saved / "config.json", as_it_was)
    assert torch.equal(outputs(T.BertModel.from_pretrained(saved)), expected)


def rewrite(path: Path, change) -> None:
    """Save a checkpoint again with tensors changed by name."""
    tensors = {key: value.clone() for key, value in load_file(path).items()}  # not a map of what is rewritten
    change({key.rpartition(".")[2]: (tensors, key) for key in tensors})
    save_file(tensors, path, {"format": "pt"})


def test_a_truncated_or_edited_checkpoint_is_refused(saved):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        T.BertModel.from_pretrained(saved)
    path.write_bytes(whole)
    rewrite(path, lambda at: at["codes"][0][at["codes"][1]].add_(1))
    with pytest.raises(ValueError, match="codes was changed after it was saved"):
        T.BertModel.from_pretrained(saved)
    rewrite(path, lambda at: at["codes"][0].pop(at["codes"][1]))
    with pytest.raises(ValueError, match="does not hold the compressed table"):
        T.BertModel.from_pretrained(saved)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("records", lambda t: t.add_(1), "got"),
        ("scales", lambda t: t.add_(1), "got"),
        ("tiers", lambda t: t[0, 1:].fill_(9), "tiers: expected 0 or 1, then 0 to 8 bits"),
        ("tiers", lambda t: t[0, 1:].fill_(7), "directory: the places of the records do not"),
        ("tiers", lambda t: t[1, 0].fill_(2), "tiers: expected 0 or 1"),
        ("directory", lambda t: t[0, 1].fill_(-1), "directory: expected tiers below 4, got 15"),
        ("directory", lambda t: t[1, 0].fill_(0), "directory: the places of the records do not follow"),
    ],
)
def test_corrupt_packed_tables_are_refused(saved_packed, name, change, message):
    rewrite(saved_packed / "model.safetensors", lambda at: change(at[name][0][at[name][1]]))
    with pytest.raises(ValueError, match=f"{name} was changed after it was saved"):
        T.BertModel.from_pretrained(saved_packed)
    edit(saved_packed / "config.json", of_table(checksums={}))
    if message == "got":  # other rows, but whole
        T.BertModel.from_pretrained(saved_packed)
    else:
        with pytest.raises(ValueError, match=f"the saved embedding is damaged: .*{message}"):
            T.BertModel.from_pretrained(saved_packed)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("records", torch.float32), ("records", torch.int64), ("tiers", torch.int32), ("scales", torch.int32)],
)
def test_tensors_of_another_dtype_are_not_cast(saved_packed, name, dtype):
    edit(saved_packed / "config.json", of_table(checksums={}))
    rewrite(saved_packed / "model.safetensors", lambda at: cast(*at[name], dtype))
    with pytest.raises(ValueError, match=f"{name} is of .*, expected (torch|floating)"):
        T.BertModel.from_pretrained(saved_packed)


def cast(tensors, key, dtype):
    tensors[key] = tensors[key].to(dtype)


def test_a_neighbour_cannot_be_installed():
    with pytest.raises(UnsupportedModelError, match="method: 'neighbour' makes tables to compare with"):
        compressed(build("bert"), "packed", method="neighbour")

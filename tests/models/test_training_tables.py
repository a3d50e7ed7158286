"""Models with several compressed tables: frozen, trained, guarded in files, resized and decoded."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

T = pytest.importorskip("transformers")

import embkern
from embkern.models.checkpoint import model_bytes, stored_tables
from embkern.models.swap import table_roots
from embkern.nn import PackedHead
from tests.conftest import seed_of
from tests.example_models import V, build, gemma3n, outputs
from tests.models.compressing import held, reload
from tests.models.test_training import train

PER_LAYER, POSITIONS = "model.embed_tokens_per_layer", "transformer.wpe"


def gpt2():
    torch.manual_seed(seed_of(0))
    config = T.GPT2Config(
        vocab_size=V, n_embd=32, n_layer=1, n_head=4, n_positions=64, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return T.GPT2LMHeadModel(config).eval()


MAKERS = {
    "per-layer table": (
        lambda: gemma3n(tie_word_embeddings=False), ["model.embed_tokens", PER_LAYER, "lm_head"]
    ),
    "positions": (gpt2, ["transformer.wte", POSITIONS, "lm_head"]),
}  # fmt: skip


@pytest.fixture(params=MAKERS)
def case(request):
    """A model whose input, a further table and untied head are packed, and the names of the three."""
    return made(request.param)


def made(name: str):
    make, names = MAKERS[name]
    model = make()
    embkern.compress(model, ratio=1.5, tables=names, calibrate=False)
    assert isinstance(model.lm_head, PackedHead)
    return model, names


def test_frozen_and_trained_tables_are_saved_and_loaded(case, tmp_path):
    model, names = case
    modules = {name: model.get_submodule(name) for name in names}
    before = {name: {n: t.clone() for n, t in held(module).items()} for name, module in modules.items()}
    model.requires_grad_(True)  # as scripts do to everything
    with pytest.warns(UserWarning, match="gets no gradients"):
        train(model, torch.optim.AdamW, 1e-3, 2)
    for name, module in modules.items():
        assert all(torch.equal(tensor, before[name][n]) for n, tensor in held(module).items()), name
    assert torch.equal(outputs(reload(model, tmp_path / "frozen")), outputs(model))

    size = model_bytes(model)
    adjustments = embkern.unfreeze_table(model)
    assert list(adjustments) == names
    assert len({id(each) for each in adjustments.values()}) == 3
    assert model_bytes(model) == size
    train(model, torch.optim.AdamW, 1e-3, 2)
    assert all(change.any() for each in adjustments.values() for change in each.parameters())
    trained = outputs(model)
    loaded = reload(model, tmp_path / "trained")
    assert torch.equal(outputs(model), trained), "saving changes nothing"
    assert not any("adjustment" in key for key in loaded.state_dict())
    stored = stored_tables(model)
    for name, root in table_roots(loaded).items():
        for tensor, value in stored[name].to(dtype=root.dtype).tensors().items():
            assert torch.equal(getattr(root, tensor), value), f"{name}.{tensor}"
    assert_close(outputs(loaded), trained, atol=5e-3, rtol=1e-2)  # stored in 16 bits

    embkern.freeze_table(model)
    assert_close(outputs(model), trained, atol=1e-6, rtol=1e-5)
    assert not any("adjustment" in key for key in model.state_dict())


def test_one_of_several_tables_is_trained(case):
    model, names = case
    for name in names:
        assert list(embkern.unfreeze_table(model, name)) == [name]
        trained = {key for key, each in model.named_parameters() if ".adjustment." in key}
        assert trained == {key for key in trained if key.startswith(name)} != set()
        embkern.freeze_table(model, name)
        assert not any("adjustment" in key for key, _ in model.named_parameters())
    assert list(embkern.unfreeze_table(model, "output")) == ["lm_head"]
    assert list(embkern.unfreeze_table(model, "input")) == names[:1]
    with pytest.raises(ValueError, match=r"table: expected .*, got 'wrong', which selects none of .*lm_head"):
        embkern.unfreeze_table(model, "wrong")


def test_each_guard_alone_stops_a_reader_without_embkern(case, tmp_path):
    model, names = case
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]  # what such a reader skips
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    guards = {f"{name}.weight" for name in names}
    assert {key for key, tensor in tensors.items() if tensor.numel() == 0} == guards
    for guard in guards:
        kept = {key: tensor for key, tensor in tensors.items() if key == guard or key not in guards}
        save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            type(model).from_pretrained(tmp_path)


def test_the_guard_of_a_head_that_has_another_name_in_files(tmp_path):
    model = build("gpt-neox")
    embkern.compress(model, ratio=1.5, tables=["output"], calibrate=False)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_changes_of_a_shared_table_are_resumed(name, tmp_path):
    """A file has them once, under the name of the table's first module."""
    model = build(name)
    embkern.compress(model, ratio=1.5, calibrate=False)
    fresh = copy.deepcopy(model)
    for each in (model, fresh):
        embkern.unfreeze_table(each)
    train(model, torch.optim.AdamW, 1e-3, 2)
    model.hf_quantizer.keeps_adjustment = True
    model.save_pretrained(tmp_path)
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert torch.equal(outputs(fresh), outputs(model))


def test_decoded_tables_require_gradients_as_before(case):
    model, names = case
    other, expected = model.get_submodule(names[1]), outputs(model)
    rows = other.weight.clone()
    model.hf_quantizer.originals[1].trained = False  # as if it had been frozen before it was compressed
    embkern.unfreeze_table(model, names[1])
    dense = model.dequantize()
    assert [dense.get_submodule(name).weight.requires_grad for name in names] == [True, False, True]
    assert torch.equal(dense.get_submodule(names[1]).weight, rows)
    assert_close(outputs(dense), expected, atol=2e-6, rtol=1e-5)


def test_resizing_keeps_what_is_trained():
    model, names = made("positions")
    adjustments = embkern.unfreeze_table(model)
    train(model, torch.optim.AdamW, 1e-3, 2)
    adjustments["lm_head"].scales.requires_grad_(False)
    trained = outputs(model)
    embkern.resize_token_embeddings(model, V + 3)
    assert_close(outputs(model)[..., :V], trained, atol=1e-6, rtol=1e-5)
    now = {name: model.get_submodule(name).adjustment for name in names}
    assert now[POSITIONS] is adjustments[POSITIONS], "it has no row per token"
    assert now[POSITIONS].scales.any()
    assert not any(
        change.any() for name in ("transformer.wte", "lm_head") for change in now[name].parameters()
    )
    assert now["lm_head"].scales.shape == (V + 3,)
    assert [now[name].scales.requires_grad for name in names] == [True, True, False]
    losses = train(model, torch.optim.AdamW, 1e-3, 3)
    assert losses[-1] < losses[0]
    embkern.freeze_table(model)
    embkern.resize_token_embeddings(model, V)
    assert not any("adjustment" in key for key, _ in model.named_parameters())


def test_writes_into_any_table_are_refused(case):
    model, names = case
    for name in names:
        module = model.get_submodule(name)
        assert module.weight.shape == module.table.to_dense().reshape(module.shape).shape
        with pytest.raises(RuntimeError, match="weight: expected no write"):
            module.weight.data[2] = 0
        rows = torch.tensor([[3, 1], [2, 3]])
        assert_close(torch.nn.functional.embedding(rows, module.weight), module.weight.clone()[rows])


def test_models_that_were_compressed_one_by_one_train_apart():
    parts = [build("bert-backbone") for _ in range(2)]
    for part in parts:
        embkern.compress(part, ratio=1.5)
    whole = torch.nn.ModuleList(parts)
    adjustments = embkern.unfreeze_table(whole)
    assert list(adjustments) == [f"{each}.embeddings.word_embeddings" for each in range(2)]
    assert [part.embeddings.word_embeddings.adjustment for part in parts] == list(adjustments.values())

"""An N-Grammer in a model: attach, train, save, load, generate with and without a cache, detach."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")

import embkern
from embkern import inspection
from embkern.models.checkpoint import model_bytes
from embkern.models.find_table import UnsupportedModelError, find_table
from tests.example_models import V, build, outputs
from tests.example_tables import quantizing  # noqa: F401 (a fixture)
from tests.methods.row_tables import needs_faiss
from tests.models.compressing import compressed, reload

pytestmark = [needs_faiss, pytest.mark.usefixtures("quantizing")]
SMALL = {"heads": 4, "bits": 4, "buckets": 64}
TABLES = [None, "factors", "packed", "product"]


def with_ngrammer(name="gpt2", kind=None, **options):
    """A model whose N-Grammer says something, in evaluation mode."""
    model = build(name)
    if kind is not None:
        compressed(model, kind)
    layer = embkern.enable_ngrammer(model, **{**SMALL, **options})
    with torch.no_grad():
        for parameter in (layer.ngram_gain, layer.ngram_shift):
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return model.eval()


def prompts(batch=2, length=7):
    return torch.randint(3, V, (batch, length), generator=torch.Generator().manual_seed(2))


def generated(model, ids, **options):
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, **options)


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "llama-untied", "gemma3", "opt"])
def test_round_trip(tmp_path, name, kind):
    model = with_ngrammer(name, kind)
    expected = outputs(model)
    loaded = reload(model, tmp_path / "saved")
    assert_close(outputs(loaded), expected, atol=1e-6, rtol=1e-5)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 4
    assert config["ngrammer"]["heads"] == 4
    again = reload(loaded, tmp_path / "again")
    files = [(tmp_path / each / "model.safetensors").read_bytes() for each in ("saved", "again")]
    assert files[0] == files[1]
    ids = prompts()
    assert torch.equal(generated(again, ids), generated(loaded, ids, use_cache=False))


@pytest.mark.parametrize("combine", ["add", "concat"])
def test_a_new_one_that_adds_leaves_the_model_as_it_is(combine):
    model = build("gpt2")
    before, bytes_before = outputs(model), model_bytes(model)
    layer = embkern.enable_ngrammer(model, **SMALL, combine=combine)
    assert torch.equal(outputs(model), before) == (combine == "add")
    assert model_bytes(model) == bytes_before + sum(each.nbytes for each in layer.parameters())
    if combine == "concat":  # rows have the same size as before on average
        rows = model.get_input_embeddings()(torch.arange(V)).detach()
        dense = model.get_input_embeddings().weight.detach()
        assert 0.5 < float(rows.square().mean() / dense.square().mean()) < 2


@pytest.mark.parametrize("kind", [None, "packed"])
def test_bytes_with_a_compressed_table(kind):
    model = build("gpt2")
    if kind:
        compressed(model, kind)
    before = model_bytes(model)
    layer = embkern.enable_ngrammer(model, **SMALL)
    assert model_bytes(model) == before + sum(each.nbytes for each in layer.parameters())


@pytest.mark.parametrize("kind", [None, "packed"])
@pytest.mark.parametrize("combine", ["add", "concat"])
def test_it_is_trained_with_the_model(tmp_path, kind, combine):
    model = with_ngrammer(kind=kind, combine=combine, decay=0.9)
    layer = model.get_input_embeddings().ngrammer
    before, ids = {name: each.clone() for name, each in layer.state_dict().items()}, prompts(8, 12)
    model.train()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for name in ("ngrams", "ngram_gain", "ngram_shift", "codewords"):
        assert not torch.equal(layer.state_dict()[name], before[name]), name
    model.eval()
    loaded = reload(model, tmp_path)
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if kind is None else {"atol": 1e-2, "rtol": 1e-2}
    assert_close(outputs(loaded), outputs(model), **tolerance)
    assert torch.equal(loaded.get_input_embeddings().ngrammer.latent_ids, layer.latent_ids)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "gemma3"])
def test_generation_with_a_cache_is_that_without(name, options):
    model, ids = with_ngrammer(name), prompts(3)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # left padding of a shorter prompt
    ids[1, :3] = 0
    expected = generated(model, ids, attention_mask=mask, use_cache=False, do_sample=False,
                         num_beams=options.get("num_beams", 1))  # fmt: skip
    got = generated(model, ids, attention_mask=mask, do_sample=False, **options)
    assert torch.equal(got, expected)
    alone = generated(model, ids[1:2, 3:], do_sample=False, **options)
    assert torch.equal(got[1, 3:], alone[0]), "padding precedes no token"
    assert model.get_input_embeddings().ngrammer.previous is None


def test_assisted_generation_is_that_without():
    model, ids = with_ngrammer("llama-tied"), prompts(1)
    assistant = build("llama-tied")
    expected = generated(model, ids, use_cache=False, do_sample=False)
    assert torch.equal(generated(model, ids, do_sample=False, assistant_model=assistant), expected)


def test_a_loop_of_ones_own_passes_the_preceding_ids():
    model, ids = with_ngrammer(), prompts()
    expected = model(input_ids=ids).logits
    first = model(input_ids=ids[:, :4], use_cache=True)
    for call in (model, model.transformer):
        with pytest.raises(ValueError, match=r"preceding_ids: the N-Grammer needs the token before"):
            call(input_ids=ids[:, 4:], past_key_values=first.past_key_values)
    assert model.get_input_embeddings().ngrammer.previous is None
    with pytest.raises(ValueError, match=r"preceding_ids: expected all ids so far"):
        model(input_ids=ids[:, 4:], past_key_values=first.past_key_values, preceding_ids=ids[:, :2])
    rest = model(input_ids=ids[:, 4:], past_key_values=first.past_key_values, preceding_ids=ids)
    assert_close(torch.cat([first.logits, rest.logits], 1), expected, atol=1e-5, rtol=1e-4)
    again = model(input_ids=ids, preceding_ids=ids)
    assert torch.equal(again.logits, expected)


def test_copies_and_backbones(tmp_path):
    model, ids = with_ngrammer(), prompts()
    expected = generated(model, ids, do_sample=False)
    twin = copy.deepcopy(model)
    assert torch.equal(generated(twin, ids, do_sample=False), expected)
    with torch.no_grad():
        twin.get_input_embeddings().ngrammer.ngram_shift += 1
    assert torch.equal(generated(model, ids, do_sample=False), expected)
    hidden = model.transformer(input_ids=ids).last_hidden_state
    model.save_pretrained(tmp_path)
    from transformers import AutoModel

    assert_close(AutoModel.from_pretrained(tmp_path).eval()(input_ids=ids).last_hidden_state, hidden)


@pytest.mark.parametrize("kind", [None, "factors"])
def test_disable_removes_it_whole(tmp_path, kind):
    model = build("gpt2")
    if kind:
        compressed(model, kind)
    before, ids = outputs(model), prompts()
    text = generated(model, ids, do_sample=False)
    layer = embkern.enable_ngrammer(model, **SMALL)
    torch.nn.init.normal_(layer.ngram_gain)
    assert not torch.equal(outputs(model), before)
    with pytest.raises(ValueError, match="its N-Grammer has no place in a dense model"):
        model.dequantize()
    embkern.disable_ngrammer(model)
    assert torch.equal(outputs(model), before)
    assert torch.equal(generated(model, ids, do_sample=False), text)
    assert_close(outputs(reload(model, tmp_path)), before, atol=1e-6, rtol=1e-5)
    assert hasattr(model.config, "quantization_config") == (kind is not None)
    embedding = model.get_input_embeddings()
    assert not embedding._forward_hooks
    assert not embedding._forward_hooks_with_kwargs
    with pytest.raises(ValueError, match="expected one with an N-Grammer, got one without"):
        embkern.disable_ngrammer(model)
    embkern.enable_ngrammer(model, **SMALL)


@pytest.mark.parametrize("kind", [None, "packed"])
def test_inspect_describes_table_and_ngrammer(tmp_path, kind):
    model = with_ngrammer("llama-tied", kind)
    model.save_pretrained(tmp_path)
    found = inspection.inspect(tmp_path)
    layer = model.get_input_embeddings().ngrammer
    assert found.ngrammer_bytes == sum(each.nbytes for each in layer.state_dict().values())
    assert found.facts()["N-Grammer"] == f"{found.ngrammer_bytes:,} bytes beside the table"
    assert (found.num_embeddings, found.embedding_dim) == model.get_input_embeddings().weight.shape
    assert found.compressed == (kind is not None)
    assert found.heads == ["lm_head"]
    assert set(found.scales.values()) == {1.0}
    assert found.model_bytes == model_bytes(model)
    build("llama-tied").save_pretrained(tmp_path / "without")
    without = inspection.inspect(tmp_path / "without")
    assert without.ngrammer_bytes is None
    assert "N-Grammer" not in without.facts()


def test_what_is_refused():
    with pytest.raises(UnsupportedModelError, match="expected a causal one, got T5ForConditionalGeneration"):
        embkern.enable_ngrammer(build("t5"))
    model = with_ngrammer()
    with pytest.raises(UnsupportedModelError, match="has an N-Grammer already"):
        embkern.enable_ngrammer(model)
    with pytest.raises(UnsupportedModelError, match="compress the table first"):
        find_table(model)


def test_damage_is_found(tmp_path):
    from safetensors.torch import load_file, save_file

    model = with_ngrammer()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    changed = {name: each.clone() for name, each in tensors.items()}
    name = next(name for name in changed if name.endswith("latent_ids"))
    changed[name][3, 1] ^= 1
    save_file(changed, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the saved N-Grammer is damaged: latent_ids"):
        type(model).from_pretrained(tmp_path)
    save_file({n: t for n, t in tensors.items() if n != name}, path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="does not hold the N-Grammer its config describes: expected ngrammer"
    ):
        type(model).from_pretrained(tmp_path)
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["ngrammer"]["buckets"] = 63
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantization_config was changed after it was saved"):
        type(model).from_pretrained(tmp_path)

"""Compressing tables by name: position tables, per-layer tables and untied heads, saved and loaded."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close

T = pytest.importorskip("transformers")

import embkern
from embkern import EmbkernConfig, FactorizedHead, PackedEmbedding, PackedHead
from embkern.cli import main as cli
from embkern.models.checkpoint import model_bytes, stored_tables
from embkern.models.find_table import UnsupportedModelError
from embkern.models.select_tables import find_tables
from embkern.nn import SegmentedEmbedding
from embkern.nn.table_module import TableModule
from tests.example_models import H, V, build, gemma3n, outputs
from tests.models.compressing import edit, reload

LAYERS, SEGMENT = 2, H // 2  # of ``gemma3n``


def neox() -> T.PreTrainedModel:
    """A model whose untied head has another name in the file."""
    return build("gpt-neox")


def with_bias() -> T.PreTrainedModel:
    """A model whose untied head has a bias."""
    torch.manual_seed(0)
    config = T.PhiConfig(
        vocab_size=V, hidden_size=H, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = T.PhiForCausalLM(config).eval()
    nn.init.normal_(model.lm_head.bias)
    return model


CASES = {
    "positions of GPT-2": (lambda: build("gpt2"), ["wpe"], ["transformer.wpe"]),
    "input and positions of BERT": (
        lambda: build("bert"),
        ["input", "*.position_embeddings"],
        ["bert.embeddings.word_embeddings", "bert.embeddings.position_embeddings"],
    ),
    "head of Llama": (lambda: build("llama-untied"), ["lm_head"], ["lm_head"]),
    "input and head of Llama": (
        lambda: build("llama-untied"),
        ["input", "output"],
        ["model.embed_tokens", "lm_head"],
    ),
    "head of GPT-NeoX": (neox, ["output"], ["embed_out"]),
    "head with a bias": (with_bias, ["output"], ["lm_head"]),
    "per-layer table": (gemma3n, ["embed_tokens_per_layer"], ["model.embed_tokens_per_layer"]),
    "input and per-layer table": (
        gemma3n,
        ["embed_tokens*"],
        ["model.embed_tokens", "model.embed_tokens_per_layer"],
    ),
    "tied table by the name of its head": (lambda: build("gpt2"), ["lm_head"], ["transformer.wte"]),
    "all modules of T5's table": (lambda: build("t5"), ["encoder.embed_tokens"], ["shared"]),
    "scaled table of BART": (lambda: build("bart-scaled"), ["decoder.embed_tokens"], ["model.shared"]),
}


def linear_name(model, name: str) -> str:
    return "lm_head" if name == "embed_out" and hasattr(model, "lm_head") else name


@pytest.mark.parametrize("method", ["allocate", "svd"])
@pytest.mark.parametrize("case", CASES)
def test_round_trip(tmp_path, case, method):
    """Compressed in place, saved, reloaded, decoded, saved as a dense model; and compressed while loading."""
    make, patterns, names = CASES[case]
    model = make()
    names = [linear_name(model, name) for name in names]
    model.save_pretrained(tmp_path / "dense")
    kinds = {name: type(model.get_submodule(name)) for name in names}
    before, others = model_bytes(model), {n for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    size = dict(ratio=1.1, calibrate=False) if method == "allocate" else dict(rank=4)
    report = embkern.compress(model, method=method, tables=patterns, **size)
    small = outputs(model)

    assert [each.name for each in report.tables] == names
    assert report.table_bytes == sum(each.table_bytes for each in report.tables)
    assert report.compressed_bytes == sum(each.nbytes for each in stored_tables(model).values())
    assert report.model_bytes_before == before
    assert before - report.model_bytes_after == report.table_bytes - report.compressed_bytes
    still = {n for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    found = {n for n, m in model.named_modules() if isinstance(m, TableModule)}
    assert set(names) <= found
    assert still == others - found

    loaded = reload(model, tmp_path / "small")
    assert_close(outputs(loaded), small, atol=1e-6, rtol=1e-5)
    assert model_bytes(loaded) == report.model_bytes_after
    again = reload(loaded, tmp_path / "again")
    first, second = ((tmp_path / place / "model.safetensors").read_bytes() for place in ("small", "again"))
    assert first == second
    again.dequantize()
    assert {name: type(again.get_submodule(name)) for name in names} == kinds
    assert not any(isinstance(each, TableModule) for each in again.modules())
    assert_close(outputs(again), small, atol=2e-6, rtol=1e-5)
    vanilla = reload(again, tmp_path / "vanilla")
    assert "quantization_config" not in json.loads((tmp_path / "vanilla" / "config.json").read_text())
    assert_close(outputs(vanilla), small, atol=2e-6, rtol=1e-5)

    config = EmbkernConfig(method=method, tables=patterns, **size)
    fly = type(model).from_pretrained(tmp_path / "dense", quantization_config=config)
    assert_close(outputs(fly), small, atol=1e-6, rtol=1e-5)
    assert_close(outputs(reload(fly, tmp_path / "fly")), small, atol=1e-6, rtol=1e-5)


def test_the_per_layer_table_of_the_tests_is_read():
    model = gemma3n()
    before = outputs(model)
    with torch.no_grad():
        model.model.embed_tokens_per_layer.weight.mul_(-1)
    assert (outputs(model) - before).abs().max() > 1e-3


def test_an_untied_head_equals_a_linear_layer_over_the_decoded_rows():
    model = with_bias()
    bias, hidden = model.lm_head.bias.detach().clone(), torch.randn(3, 5, H)
    embkern.compress(model, ratio=2, tables=["output"], calibrate=False)
    head = model.lm_head
    assert isinstance(head, PackedHead)
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    expected = nn.functional.linear(hidden, head.table.to_dense(), bias)
    assert_close(head(hidden), expected, atol=1e-5, rtol=1e-5)
    model = with_bias()
    embkern.compress(model, method="svd", rank=H, tables=["output"])
    assert isinstance(model.lm_head, FactorizedHead)


def test_a_packed_head_trains_apart_from_the_input():
    model = build("llama-untied")
    embkern.compress(model, ratio=2, tables=["input", "output"], calibrate=False)
    embedding, head = model.get_input_embeddings(), model.lm_head
    assert embedding.scales is not head.scales
    ids = torch.arange(3, 21).reshape(2, 9)
    (changes,) = embkern.unfreeze_table(model, "lm_head").values()
    assert (head.adjustment, embedding.adjustment) == (changes, None)
    model(input_ids=ids, labels=ids).loss.backward()
    assert changes.scales.grad.any()


def test_segments_of_a_per_layer_table_are_rows_of_their_own():
    """The rows of a layer whose segments are a thousandth as long keep their directions."""
    model = gemma3n()
    dense = model.model.embed_tokens_per_layer
    with torch.no_grad():
        dense.weight[:, SEGMENT:] *= 1e-3
    ids, weight, padding = torch.arange(V - 6).view(5, -1), dense.weight.detach().clone(), dense.padding_idx
    before = dense(ids)
    embkern.compress(model, ratio=4, tables=["embed_tokens_per_layer"], calibrate=False)
    layer = model.model.embed_tokens_per_layer
    assert isinstance(layer, SegmentedEmbedding)
    assert (layer.segments, layer.num_embeddings, layer.embedding_dim) == (LAYERS, V - 6, LAYERS * SEGMENT)
    assert (layer.scale, layer.padding_idx) == (SEGMENT**0.5, padding)
    assert layer(ids).shape == before.shape
    assert_close(layer(ids), layer.weight[ids] * SEGMENT**0.5, atol=1e-6, rtol=1e-5)
    whole = embkern.methods.allocate(weight, ratio=4).to_dense()
    expected, apart, together = (
        each.detach().float().view(-1, LAYERS, SEGMENT)[1:]  # the first row is of zeros
        for each in (weight, layer.weight, whole)
    )
    lost, lost_together = (
        1 - nn.functional.cosine_similarity(expected, each, dim=2).mean(0).min() for each in (apart, together)
    )
    assert lost < 0.1
    assert lost < lost_together / 3
    changes = layer.unfreeze()
    layer(ids).sum().backward()
    assert changes.scales.grad.view(-1, LAYERS)[1:].all()
    assert not changes.scales.grad.view(-1, LAYERS)[padding].any()
    with pytest.raises(IndexError):
        layer(torch.tensor([V - 6]))
    with pytest.raises(ValueError, match="segments: expected a divisor of the table's 190 rows, got 4"):
        SegmentedEmbedding(layer.table, segments=4)


def test_every_table_has_its_ratio(tmp_path):
    model = build("llama-untied")
    report = embkern.compress(model, tables={"input": 4, "lm_head": 2}, calibrate=False)
    first, second = report.tables
    assert first.ratio >= 4
    assert 2 <= second.ratio < 4
    assert report.ratio == report.table_bytes / report.compressed_bytes
    shown = report.rows()
    assert shown["method"] == "allocate, 2 tables"
    assert first.figures().items() <= shown.items()
    assert shown["lm_head, bytes"] == str(second.size)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (config["format_version"], config["tables"]) == (3, {"input": 4.0, "lm_head": 2.0})
    assert list(config["named_tables"]) == ["lm_head"]
    report = embkern.compress(
        build("llama-untied"), ratio=4, tables={"*": None, "lm_head": 2}, calibrate=False
    )
    assert [each.ratio >= 4 for each in report.tables] == [True, False]


def test_a_table_by_default_is_described_as_before(tmp_path):
    """Models whose input table alone is compressed stay readable by earlier versions."""
    model = build("gpt2")
    report = embkern.compress(model, ratio=2, calibrate=False)
    assert report.tables == []
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2
    assert not {"tables", "named_tables"} & config.keys()
    assert "segments" not in config["table"]


def test_a_backbone_leaves_the_head_out(tmp_path):
    model = build("llama-untied")
    embkern.compress(model, ratio=2, tables=["input", "output"], calibrate=False)
    model.save_pretrained(tmp_path / "whole")
    backbone = T.LlamaModel.from_pretrained(tmp_path / "whole")
    backbone.save_pretrained(tmp_path / "backbone")
    model.model.save_pretrained(tmp_path / "nested")
    for found in (
        backbone,
        T.LlamaModel.from_pretrained(tmp_path / "backbone"),
        T.LlamaModel.from_pretrained(tmp_path / "nested"),
    ):
        assert isinstance(found.get_input_embeddings(), PackedEmbedding)
        # transformers 5.6 loads the table of a backbone in the dtype of the file, which rounds its rows.
        assert_close(outputs(found), outputs(model.model), atol=1e-2, rtol=1e-2)
    with pytest.raises(ValueError, match="does not hold the compressed table .* expected lm_head"):
        T.LlamaForCausalLM.from_pretrained(tmp_path / "nested")


@pytest.mark.parametrize("size", [V + 9, V - 30])
def test_resizing_reaches_a_packed_head(tmp_path, size):
    model = with_bias()
    embkern.compress(model, ratio=2, tables=["input", "output"], calibrate=False)
    before = outputs(model)
    embkern.resize_token_embeddings(model, size)
    assert outputs(model).shape[-1] == size
    assert_close(outputs(model)[..., : min(size, V)], before[..., :size], atol=1e-6, rtol=1e-5)
    assert_close(outputs(reload(model, tmp_path)), outputs(model), atol=2e-3, rtol=1e-3)  # stored in 16 bits
    assert outputs(model.dequantize()).shape[-1] == size


def test_resizing_a_model_whose_input_is_dense_is_refused():
    model = build("llama-untied")
    embkern.compress(model, ratio=2, tables=["output"], calibrate=False)
    with pytest.raises(ValueError, match="expected a compressed input table, got a dense one beside lm_head"):
        embkern.resize_token_embeddings(model, V + 1)


def test_names_that_select_nothing_or_what_cannot_be_compressed():
    model = build("llama-untied")
    for pattern in ("embed", "model.layers.0", "encoder.embed_tokens"):
        with pytest.raises(UnsupportedModelError, match=rf"got '{pattern}', which selects none of .*lm_head"):
            embkern.compress(model, ratio=2, tables=[pattern])
    with pytest.raises(UnsupportedModelError, match="embed_positions .* does not look up rows by their ids"):
        embkern.compress(build("bart"), ratio=2, tables=["embed_positions"])
    with pytest.raises(
        ValueError, match="encoder.embeddings.token_type_embeddings: ratio: 16 leaves no room"
    ):
        bert = build("bert")
        bert.encoder = bert.bert
        del bert.bert
        embkern.compress(bert, ratio=16, tables=["token_type_embeddings"])
    embkern.compress(model, ratio=2, tables=["output"], calibrate=False)
    with pytest.raises(UnsupportedModelError, match="compressed already; .* name all tables in one call"):
        embkern.compress(model, ratio=2, tables=["input"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(tables=[], ratio=2), "tables: expected at least one name or pattern, got none"),
        (dict(tables={"input": 4, "output": None}), "expected exactly one of ratio and rank"),
        (dict(tables={"input": 0.5}), "ratio: expected at least 1"),
        (dict(tables={"input": 2}, rank=3, method="svd"), "tables: expected no ratios with a rank, got 2"),
        (dict(tables=3, ratio=2), "tables"),
    ],
)
def test_wrong_tables_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        embkern.compress(build("llama-untied"), **arguments)


def test_a_damaged_description_of_a_named_table_is_refused(tmp_path):
    model = gemma3n()
    embkern.compress(model, ratio=2, tables=["embed_tokens_per_layer"], calibrate=False)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    whole = path.read_text()
    for old, new in (('"segments": 2', '"segments": 5'), ('"embed_tokens_per_layer": {', '"embed": {')):
        assert old in whole
        path.write_text(whole.replace(old, new))
        with pytest.raises(ValueError, match="quantization_config was changed|segments: expected a divisor"):
            type(model).from_pretrained(tmp_path)


def test_a_named_table_is_found_under_another_prefix_and_refused_in_another_shape(tmp_path):
    model = gemma3n()
    embkern.compress(model, ratio=2, tables=["embed_tokens_per_layer"], calibrate=False)
    model.save_pretrained(tmp_path)

    def rename(config):
        tables = config["named_tables"]
        tables["language_model.embed_tokens_per_layer"] = tables.pop("embed_tokens_per_layer")

    edit(tmp_path / "config.json", rename)
    loaded = type(model).from_pretrained(tmp_path)
    assert_close(outputs(loaded), outputs(model), atol=1e-6, rtol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    assert_close(
        outputs(type(model).from_pretrained(tmp_path / "again")), outputs(model), atol=1e-6, rtol=1e-5
    )
    path = tmp_path / "config.json"
    old = f'"vocab_size_per_layer_input": {V - 6}'
    path.write_text(path.read_text().replace(old, old[:-1] + "9"))
    with pytest.raises(ValueError, match=f"describes {V - 6} x 32, the model's config says 99 x 32"):
        type(model).from_pretrained(tmp_path)


def test_a_model_without_an_input_embedding():
    class NGrams(T.BertModel):
        def get_input_embeddings(self):
            raise NotImplementedError

    model = NGrams(build("bert-backbone").config).eval()
    expected = outputs(model)
    report = embkern.compress(model, ratio=1.1, tables=["word_embeddings"], calibrate=False)
    assert report.counts == "the order of the ids (no tokenizer)"
    assert isinstance(model.embeddings.word_embeddings, PackedEmbedding)
    assert_close(outputs(model), expected, atol=0.1, rtol=0.1)


def test_tables_on_the_command_line(tmp_path, monkeypatch, capsys):
    def run(*words) -> str:
        monkeypatch.setattr("sys.argv", ["embkern", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code, capsys.readouterr().err
        return capsys.readouterr().out

    build("llama-untied").save_pretrained(tmp_path / "dense")
    sizes = ["--ratio", 2, "--tables", "input", "--tables", "lm_head=1.5", "--no-calibrate"]
    shown = run("compress", tmp_path / "dense", "-o", tmp_path / "small", *sizes, "--json")
    report = json.loads(shown)
    assert report["recipe"]["tables"] == {"input": None, "lm_head": 1.5}
    assert [each["name"] for each in report["tables"]] == ["model.embed_tokens", "lm_head"]
    small = T.LlamaForCausalLM.from_pretrained(tmp_path / "small")
    assert isinstance(small.lm_head, PackedHead)
    run("export", tmp_path / "small", "-o", tmp_path / "again")
    again = T.LlamaForCausalLM.from_pretrained(tmp_path / "again")
    assert type(again.lm_head) is nn.Linear
    assert_close(outputs(again), outputs(small), atol=1e-6, rtol=1e-5)
    monkeypatch.setattr("sys.argv", ["embkern", "compress", "x", "-o", "y", "--tables", "lm_head=much"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "tables: expected NAME or NAME=RATIO, got 'lm_head=much'" in capsys.readouterr().err


def test_the_order_of_the_tables_is_that_of_the_model():
    model = build("bert")
    tables = find_tables(model, {"*position_embeddings": 2, "input": None, "word*": 3})
    assert [(table.role, ratio) for table, ratio in tables] == [("input", 3), ("other", 2)]

"""``embkern convert``: models and files with tables of the first edition of the packed format."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

pytest.importorskip("transformers")

import embkern
from embkern import PackedTable
from embkern.cli import main as cli
from embkern.methods.second_edition import added_error, second_edition
from embkern.models.checkpoint import stored_table, stored_tables
from embkern.models.conversion import ConvertedTable
from embkern.models.loading import load_model
from embkern.models.report import read_report
from embkern.models.static_embeddings import is_static
from embkern.ops.packed_codes import LEVELS_SHAPE
from embkern.ops.packed_format import Tier
from tests.example_models import build, gemma3n, outputs, word_tokenizer
from tests.first_edition import LEVELS, first_edition, of_model

CHANGED = {"records", "levels", "scales"}


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["embkern", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-tied", "t5", "gemma3"])
def test_everything_else_of_a_model_stays(tmp_path, name):
    model = build(name)
    (table,) = of_model(model).values()
    model.save_pretrained(tmp_path / "old")
    word_tokenizer().save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "notes").mkdir()
    (tmp_path / "old" / "notes" / "mine.txt").write_text("as it is")
    found = embkern.convert(tmp_path / "old", tmp_path / "new")
    (one,) = found.tables
    before, after = (tmp_path / each for each in ("old", "new"))
    files = {path.relative_to(before): path for path in before.rglob("*") if path.is_file()}
    assert set(files) == {path.relative_to(after) for path in after.rglob("*") if path.is_file()}
    for place, path in files.items():
        if place.name not in ("config.json", "model.safetensors"):
            assert path.read_bytes() == (after / place).read_bytes(), place

    tensors, others = (load_file(each / "model.safetensors") for each in (before, after))
    assert tensors.keys() == others.keys()
    for key, tensor in tensors.items():
        if key.rpartition(".")[2] not in CHANGED:
            assert torch.equal(tensor, others[key]), key
    config, other = (json.loads((each / "config.json").read_text()) for each in (before, after))
    assert config.pop("quantization_config") != other.pop("quantization_config")
    assert config == other

    expected, loaded = second_edition(table), load_model(after)
    got = stored_table(loaded)
    for tensor, wanted in zip(got.packed_tensors(), expected.packed_tensors(), strict=True):
        assert (tensor is None) == (wanted is None)
        assert tensor is None or torch.equal(tensor, wanted)
    assert one == ConvertedTable.of(one.name, table, expected)
    assert one.bytes_before == table.nbytes
    assert one.bytes_after == got.nbytes
    error = added_error(table, expected)
    assert (one.direction_error, one.mse, one.squared_error) == (error.direction, error.mse, error.share)
    dense = build(name)
    with torch.no_grad():
        dense.get_input_embeddings().weight.copy_(expected.to(torch.float32).to_dense())
    assert_close(outputs(loaded), outputs(dense), rtol=1e-4, atol=1e-5 * float(outputs(dense).abs().max()))


def test_all_tables_of_a_model_in_several_files(tmp_path):
    model = gemma3n()
    made = of_model(model, [Tier(False, (4,))], names=("input", "embed_tokens_per_layer"))
    assert len(made) == 2
    model.save_pretrained(tmp_path / "one", max_shard_size="20KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 2
    index = json.loads((tmp_path / "one" / "model.safetensors.index.json").read_text())
    found = embkern.convert(tmp_path / "one", tmp_path / "two")
    other = json.loads((tmp_path / "two" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == other["weight_map"]
    saved = sum(each.bytes_before - each.bytes_after for each in found.tables)
    assert index["metadata"]["total_size"] - other["metadata"]["total_size"] >= saved > 0
    got, expected = stored_tables(load_model(tmp_path / "two")), list(map(second_edition, made.values()))
    assert len(got) == len(found.tables) == 2
    for table, wanted in zip(got.values(), expected, strict=True):
        assert torch.equal(table.records, wanted.records)
        assert torch.equal(table.scales, wanted.scales)


def test_report_has_the_bytes_and_the_added_error(tmp_path):
    model = build("bert-backbone")
    report = embkern.compress(model, ratio=2.5, calibrate=False, output=tmp_path / "old")
    again = build("bert-backbone")
    (table,) = of_model(again).values()
    again.save_pretrained(tmp_path / "old")
    embkern.convert(tmp_path / "old", tmp_path / "new")
    found = read_report(tmp_path / "new")
    saved = table.nbytes - second_edition(table).nbytes
    assert found.compressed_bytes == report.compressed_bytes - saved
    assert found.model_bytes_after == report.model_bytes_after - saved
    assert found.ratio == report.table_bytes / found.compressed_bytes
    assert found.facts["converted from"] == "embkern.packed/1"
    error = added_error(table, second_edition(table))
    assert found.facts["direction error of the conversion"] == error.direction
    assert found.table == report.table


def test_in_place_and_by_command(tmp_path, monkeypatch, capsys):
    model = build("llama-tied")
    (table,) = of_model(model).values()
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"output: expected one, or in_place \(--in-place\), got neither"):
        embkern.convert(tmp_path / "model")
    with pytest.raises(ValueError, match="got both"):
        embkern.convert(tmp_path / "model", tmp_path / "other", in_place=True)
    run(monkeypatch, "convert", tmp_path / "model", "--in-place", "--json")
    shown = json.loads(capsys.readouterr().out)
    assert shown["tables"][0]["bytes_before"] == table.nbytes
    assert torch.equal(stored_table(load_model(tmp_path / "model")).records, second_edition(table).records)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(ValueError, match="the packed tables of .* are of the second edition already"):
        embkern.convert(tmp_path / "model", in_place=True)
    assert stored_table(load_model(tmp_path / "model")).levels.shape == LEVELS_SHAPE


def test_a_file(tmp_path, monkeypatch, capsys):
    run(monkeypatch, "convert", LEVELS, "-o", tmp_path / "new")
    assert "the error that was added" in capsys.readouterr().out
    with safe_open(tmp_path / "new", "pt") as file:
        assert file.metadata()["format"] == "embkern.packed/2"
    assert torch.equal(
        PackedTable.load(tmp_path / "new").scales, second_edition(PackedTable.load(LEVELS)).scales
    )
    with pytest.raises(FileExistsError, match="exists; choose another name"):
        embkern.convert(LEVELS, tmp_path / "new")
    with pytest.raises(
        ValueError, match=r"new: table: expected one of embkern\.packed/1, got one of the second"
    ):
        embkern.convert(tmp_path / "new", in_place=True)
    shutil.copy(LEVELS, tmp_path / "old")
    with pytest.raises(ValueError, match="output: .* is the table to read; choose another name"):
        embkern.convert(tmp_path / "old", tmp_path / "old", overwrite=True)
    embkern.convert(tmp_path / "old", in_place=True)
    assert (tmp_path / "old").read_bytes() == (tmp_path / "new").read_bytes()


def test_static_embeddings(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    from embkern.models.static_embeddings import install_bag

    modules = pytest.importorskip("sentence_transformers.models")
    static = modules.StaticEmbedding(word_tokenizer().backend_tokenizer, embedding_dim=40)
    model = library.SentenceTransformer(modules=[static])
    weight = static.embedding.weight
    table = first_edition(*weight.shape, [Tier(False, (4, 4))])
    install_bag(model, table)
    model.save(str(tmp_path / "old"))
    (one,) = embkern.convert(tmp_path / "old", tmp_path / "new").tables
    assert one.num_embeddings == len(weight)
    loaded = library.SentenceTransformer(str(tmp_path / "new"))
    assert is_static(loaded)
    assert torch.equal(loaded[0].embedding.records, second_edition(table).records)


def damaged(path) -> None:
    tensors = load_file(path)
    key = next(each for each in tensors if each.endswith(".records"))
    tensors[key][0] += 1
    save_file(tensors, path, {"format": "pt"})


def test_what_is_refused_leaves_nothing(tmp_path):
    model = build("bert-backbone")
    model.save_pretrained(tmp_path / "dense")
    of_model(model)
    model.save_pretrained(tmp_path / "old")
    for path, problem in (("none", FileNotFoundError), ("dense", ValueError)):
        with pytest.raises(problem, match=r"^path: expected"):
            embkern.convert(tmp_path / path, tmp_path / "new")
    with pytest.raises(ValueError, match="output: .* lies in the model to read"):
        embkern.convert(tmp_path / "old", tmp_path / "old" / "new")
    with pytest.raises(ValueError, match="is, or holds, the model to read"):
        embkern.convert(tmp_path / "old", tmp_path)
    shutil.copytree(tmp_path / "old", tmp_path / "damaged")
    damaged(tmp_path / "damaged" / "model.safetensors")
    with pytest.raises(ValueError, match="is damaged: records was changed after it was saved"):
        embkern.convert(tmp_path / "damaged", tmp_path / "new")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    config["quantization_config"]["table"]["settings"]["embedding_dim"] = 16
    (tmp_path / "damaged" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantization_config was changed after it was saved"):
        embkern.convert(tmp_path / "damaged", tmp_path / "new")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match="is truncated or not a safetensors file"):
        embkern.convert(tmp_path / "damaged", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "dense", "old"]

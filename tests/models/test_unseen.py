"""``allocate`` with ``unseen`` in models: rows that are not read take no bytes, and can be restored."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

pytest.importorskip("transformers")

import embkern
from embkern import EmbkernConfig, Recipe, TableEmbedding, TableHead
from embkern.cli import main as cli
from embkern.models.calibrate import choice
from embkern.models.checkpoint import model_bytes, stored_table
from embkern.models.static_embeddings import check_bag
from embkern.tables import PackedTable, PrunedPackedTable
from embkern.tables.unseen_rows import UnseenRows
from tests.example_models import V, build, outputs, word_tokenizer
from tests.models.compressing import assert_same_table, assert_shared, reload, round_as_stored
from tests.models.test_training import over, train

# outputs() reads 3 to 20, and of the config's tokens 0, 1 and 2 are kept as well.
READ = [*range(3, 24), *range(40, V, 3)]
KEPT = {0, 1, 2, *READ}


def counts() -> torch.Tensor:
    return torch.zeros(V).index_fill(0, torch.tensor(READ), 1.0) / torch.arange(1, V + 1)


def compressed(name: str, unseen: str = "mean", **more):
    model = build(name)
    report = embkern.compress(model, ratio=2.5, counts=counts(), unseen=unseen, calibrate=False, **more)
    return model, report


@pytest.mark.parametrize("unseen", ["mean", "nearest"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-tied", "t5", "gemma3"])
def test_round_trip(tmp_path, name, unseen):
    dense = build(name)
    model, report = compressed(name, unseen)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, TableEmbedding)
    assert isinstance(head, TableHead)
    assert_shared(*over(model))
    kept = set(embedding.table.kept_ids.tolist())
    assert set(READ) <= kept <= KEPT
    assert report.facts == {"kept": len(kept), "unseen": V - len(kept), "unknown": unseen}
    assert sum(tier.rows for tier in report.tiers) == len(kept)
    stored = stored_table(model)
    assert isinstance(stored, PrunedPackedTable)
    assert report.compressed_bytes == sum(report.parts.values()) == stored.nbytes
    assert stored.nbytes <= dense.get_input_embeddings().weight.nbytes / 2.5
    small = outputs(model)
    if small.shape[-1] == V and name not in ("bert", "gemma3"):  # a bias, a softcap
        others = [token for token in range(V) if token not in kept]
        rows = embedding.weight[torch.arange(V)]
        if unseen == "mean":
            assert_close(small[..., others], small[..., others[:1]].expand(*small.shape[:-1], len(others)))
        same = torch.cdist(rows[others], rows[sorted(kept)]).argmin(1)
        if unseen == "nearest":
            assert_close(small[..., others], small[..., torch.tensor(sorted(kept))[same]])
    loaded = reload(model, tmp_path / "small")
    assert model_bytes(loaded) == model_bytes(model)
    assert torch.equal(outputs(loaded), outputs(round_as_stored(model)))
    assert_close(outputs(loaded), small, atol=1e-6, rtol=1e-5)
    again = reload(loaded, tmp_path / "again")
    files = [(tmp_path / each / "model.safetensors").read_bytes() for each in ("small", "again")]
    assert files[0] == files[1]
    in_file = load_file(tmp_path / "small" / "model.safetensors")
    table = {name: each for name, each in in_file.items() if name.rpartition(".")[2] in stored.tensors()}
    assert sum(each.nbytes for each in table.values()) == stored.nbytes
    if again.can_generate():
        prompt = torch.arange(3, 9).reshape(1, 6)
        out = again.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, min_new_tokens=2
        )
        assert out.shape[1] >= 3
    again.dequantize()
    assert not over(again)
    assert_close(outputs(again), small, atol=2e-6, rtol=1e-5)


def test_half_precision_keeps_the_codes(tmp_path):
    model, _ = compressed("llama-tied")
    half = reload(model, tmp_path / "small", dtype=torch.bfloat16)
    assert outputs(half).dtype == torch.bfloat16
    assert_same_table(
        reload(half, tmp_path / "half", dtype=torch.bfloat16).model.embed_tokens, half.model.embed_tokens
    )


def test_a_calibration_on_text_says_what_is_read_while_a_model_is_loaded(monkeypatch, tmp_path):
    build("llama-tied").save_pretrained(tmp_path)
    load = type(build("llama-tied")).from_pretrained
    special = word_tokenizer()
    special.add_special_tokens({"sep_token": "green"})
    calibration = embkern.calibrate(build("llama-tied"), special, ["red blue red"] * 9)
    calibration.save(tmp_path / "calibration")
    read = {0, 1, 2, *map(int, calibration.inputs.nonzero().flatten())}
    options = {"unseen": "nearest"}
    config = EmbkernConfig(ratio=2.5, options=options, calibration=tmp_path / "calibration")
    table = load(tmp_path, quantization_config=config).get_input_embeddings().table
    assert isinstance(table, PrunedPackedTable)
    assert set(table.kept_ids.tolist()) == read
    known = {"calibration": calibration, "tokenizer": special, "ratio": 2.5}
    model = embkern.compress(build("llama-tied"), unseen="mean", **known).model
    table = model.get_input_embeddings().table
    assert isinstance(table, PrunedPackedTable)
    assert set(table.kept_ids.tolist()) == read | set(special.all_special_ids)
    message = "unseen: expected counts of text .* or a calibration on text with 'mean', .* got neither"
    monkeypatch.setattr(choice, "self_calibrate_holding_out", None)
    for calibrate in (None, True, False):  # samples would not say what will be read, and are not drawn
        config = EmbkernConfig(ratio=2, options={"unseen": "mean"}, calibrate=calibrate)
        with pytest.raises(ValueError, match=message):
            load(tmp_path, quantization_config=config)
        with pytest.raises(ValueError, match=message):
            embkern.compress(build("llama-tied"), ratio=2, unseen="mean", calibrate=calibrate)
    with pytest.raises(ValueError, match=message):
        embkern.compress(build("bert"), ratio=2, unseen="mean")
    with pytest.raises(ValueError, match="unseen: expected 'allocate' for static embeddings, got 'mean'"):
        check_bag(Recipe(ratio=2, options={"unseen": "mean"}))


def test_other_tables_leave_out_the_same_tokens_and_positions_none():
    model, untied = build("gpt2"), build("llama-untied")
    report = embkern.compress(
        model, tables={"input": 2.5, "wpe": 2}, counts=counts(), unseen="mean", calibrate=False
    )
    assert [type(stored_table(model)), type(model.transformer.wpe.table)] == [PrunedPackedTable, PackedTable]
    assert [table.facts.get("unseen", 0) > 0 for table in report.tables] == [True, False]
    embkern.compress(untied, tables={"output": 2.5}, counts=counts(), unseen="nearest", calibrate=False)
    assert isinstance(untied.lm_head, TableHead)
    assert torch.isfinite(outputs(untied)).all()


@pytest.mark.parametrize("unseen", ["mean", "nearest"])
@pytest.mark.parametrize("size", [V + 9, V - 30])
def test_resize(tmp_path, size, unseen):
    model, _ = compressed("gpt2", unseen)
    before = model.get_input_embeddings().table
    rows = before.to_dense()
    embedding = embkern.resize_token_embeddings(model, size)
    assert torch.equal(embedding.weight[: min(size, V)], rows[:size])
    embedding.table.validate()
    assert embedding.table.nbytes <= before.nbytes + (16 if unseen == "mean" else 9 * 64)
    assert outputs(model).shape[-1] == size
    loaded = reload(model, tmp_path)
    assert_close(outputs(loaded), outputs(round_as_stored(model)), atol=1e-6, rtol=1e-5)
    assert outputs(loaded.dequantize()).shape[-1] == size


@pytest.mark.parametrize("unseen", ["mean", "nearest"])
def test_training_is_shared_with_the_head_and_saved(tmp_path, unseen):
    model, _ = compressed("gpt2", unseen)
    (adjustment,) = embkern.unfreeze_table(model).values()
    losses = train(model, torch.optim.AdamW, 1e-3, 3)
    assert losses[-1] < losses[0]
    assert all(change.any() for change in adjustment.parameters())
    trained = outputs(model)
    loaded = reload(model, tmp_path)
    assert torch.equal(outputs(model), trained), "saving changes nothing"
    embkern.freeze_table(model)
    assert torch.equal(outputs(loaded), outputs(round_as_stored(model)))


@pytest.mark.parametrize("method", ["prune", "allocate"])
def test_rows_that_were_kept_apart_are_restored(tmp_path, method):
    dense, rows = build("llama-tied"), tmp_path / "rows.safetensors"
    weight = dense.get_input_embeddings().weight.detach().clone()
    options = (
        {"unknown": "error"} if method == "prune" else {"unseen": "mean", "ratio": 2.5, "calibrate": False}
    )
    settings = {"method": method, "counts": counts(), "keep_unseen": rows, **options}
    embkern.compress(dense, output=tmp_path / "small", **settings)
    kept = sorted(dense.get_input_embeddings().table.kept_ids.tolist())
    others = [token for token in range(V) if token not in kept]
    found = UnseenRows.load(rows)
    assert found.ids.tolist() == others
    assert torch.equal(found.rows, weight[others])
    embkern.restore(tmp_path / "small", rows, tmp_path / "whole")
    whole = type(dense).from_pretrained(tmp_path / "whole").eval()
    assert not over(whole)
    got = whole.get_input_embeddings().weight
    assert torch.equal(got[others], weight[others])
    assert whole.lm_head.weight is got
    if method == "prune":
        assert torch.equal(got, weight)
        assert torch.equal(outputs(whole), outputs(build("llama-tied")))
    else:
        assert_close(got[kept], dense.get_input_embeddings().weight[torch.tensor(kept)], atol=1e-3, rtol=1e-2)
    # After fine-tuning and a cast, the model still knows its rows.
    model = type(dense).from_pretrained(tmp_path / "small", dtype=torch.float16)
    embkern.resize_token_embeddings(model, V - 1)
    model.save_pretrained(tmp_path / "tuned")
    restored = embkern.restore_rows(type(dense).from_pretrained(tmp_path / "tuned"), rows)
    assert_close(
        restored.get_input_embeddings().weight[others[:-1]].float(), weight[others[:-1]], atol=1e-3, rtol=1e-2
    )


def test_rows_of_another_model_and_damaged_files_are_refused(tmp_path):
    rows, other = tmp_path / "rows.safetensors", tmp_path / "other.safetensors"
    settings = {"method": "prune", "counts": counts(), "unknown": "mean"}
    model = build("bert")
    embkern.compress(model, keep_unseen=rows, output=tmp_path / "small", **settings)
    embkern.compress(build("gpt2"), keep_unseen=other, **settings)
    before = outputs(model)
    with pytest.raises(ValueError, match="rows: expected those of the table crc32:.* another model's"):
        embkern.restore(tmp_path / "small", other, tmp_path / "whole")
    with pytest.raises(ValueError, match="rows: expected those of the table"):
        embkern.restore_rows(model, other)
    assert torch.equal(outputs(model), before)
    plain = build("bert")
    with pytest.raises(ValueError, match="compressed with keep_unseen .*, got a dense one"):
        embkern.restore_rows(plain, rows)
    embkern.compress(plain, **settings)
    with pytest.raises(
        ValueError, match="compressed with keep_unseen .*, got one that was compressed without"
    ):
        embkern.restore_rows(plain, rows)
    content = bytearray(rows.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    with pytest.raises(ValueError, match="was changed after it was saved"):
        embkern.restore(tmp_path / "small", other, tmp_path / "whole")
    with pytest.raises(FileNotFoundError, match="found none at .*nothing"):
        embkern.restore(tmp_path / "small", tmp_path / "nothing", tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    with pytest.raises(FileExistsError, match="keep_unseen: .* exists"):
        embkern.compress(build("bert"), keep_unseen=rows, **settings)
    with pytest.raises(
        ValueError, match="keep_unseen: expected method 'prune', or .* got 'svd', which stores all"
    ):
        embkern.compress(build("bert"), method="svd", rank=4, keep_unseen=tmp_path / "new")
    with pytest.raises(ValueError, match="keep_unseen: expected tokens that are not read, got none"):
        embkern.compress(build("bert"), method="prune", counts=torch.ones(V), keep_unseen=tmp_path / "new")
    with pytest.raises(ValueError, match="keep_unseen: expected one table to compress, got 2"):
        tables = {"tables": ["input", "position_embeddings"], "ratio": 2}
        embkern.compress(build("bert"), **settings, **tables, keep_unseen=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_command_line(tmp_path, monkeypatch, capsys):
    dense, corpus = tmp_path / "dense", tmp_path / "corpus.txt"
    build("bert").save_pretrained(dense)
    word_tokenizer().save_pretrained(dense)
    corpus.write_text("red blue\nblue\n")

    def run(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["embkern", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        shown = capsys.readouterr()
        return shown.out if not stopped.value.code else shown.err.splitlines()[-1]

    small, rows = tmp_path / "small", tmp_path / "rows.safetensors"
    command = ["compress", dense, "-o", small, "--ratio", 8, "--count-text", corpus, "--unseen", "mean"]
    report = json.loads(run(*command, "--keep-unseen", rows, "--json"))
    assert report["facts"] == {"kept": 6, "unseen": V - 6, "unknown": "mean"}
    assert report["recipe"]["options"] == {"unseen": "mean"}
    summary = json.loads(run("inspect", small, "--json"))
    assert (summary["kind"], summary["kept"]) == ("pruned_packed", 6)
    assert (summary["tiers"], summary["parts"]) == (report["tiers"], report["parts"])
    assert f"6 of {V}; {V - 6} unseen ones take no codes" in run("inspect", small)
    assert "(dense)" in run("restore", small, "--rows", rows, "-o", tmp_path / "whole")
    assert "exists; choose another name" in run("restore", small, "--rows", rows, "-o", tmp_path / "whole")
    assert "bytes" in run("inspect", tmp_path / "whole")

"""``embkern.compress`` and ``export_dense`` on live models and directories, with all the ways to go wrong."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch.testing import assert_close

T = pytest.importorskip("transformers")

import embkern
from embkern import PackedTable, Report
from embkern.cli import main as cli
from embkern.models.checkpoint import stored_table
from embkern.models.loading import load_model
from embkern.models.report import read_report
from embkern.nn.base import CompressedEmbedding
from embkern.text.counts import count_tokens
from embkern.text.frequencies import COMPRESSION_STRENGTH, expected_frequencies, token_frequencies
from embkern.text.prior import vocabulary_prior
from tests.example_models import H, V, build, outputs, tiny_bert, word_tokenizer
from tests.example_tables import quantizing  # noqa: F401 (a fixture)
from tests.saved_models import PACKED, SVD, both_kinds

pytestmark = pytest.mark.usefixtures("quantizing")


def test_the_rank_follows_from_the_ratio():
    report = embkern.compress(build("gpt2"), ratio=3, method="svd")
    assert report.compressed_bytes == (V + H) * report.rank * 4
    assert report.ratio >= 3


@both_kinds
def test_a_live_model_is_changed_in_place(recipe):
    model = build("gpt2")
    report = embkern.compress(model, **recipe)
    assert report.model is model
    assert isinstance(model.get_input_embeddings(), CompressedEmbedding)
    assert (report.num_embeddings, report.embedding_dim) == (V, H)
    assert report.table_bytes == V * H * 4
    assert report.compressed_bytes == stored_table(model).nbytes
    assert report.ratio == report.table_bytes / report.compressed_bytes
    saved = report.table_bytes - report.compressed_bytes
    assert report.model_bytes_before - report.model_bytes_after == saved
    assert report.head == "factorized"
    assert report.source == "GPT2LMHeadModel"


def test_a_packed_table_is_validated_a_bounded_number_of_times(source, tmp_path, monkeypatch):
    """It is when the method makes it or replaces its tensors, and when a file is read; nothing else does."""
    calls = []
    validate = PackedTable.validate
    monkeypatch.setattr(PackedTable, "validate", lambda table: (calls.append(table), validate(table)))
    report = embkern.compress(source, method="allocate", ratio=2, output=tmp_path / "out")
    assert 1 <= len(calls) <= 2
    calls.clear()
    embedding = report.model.get_input_embeddings()
    embedding(torch.tensor([0, 1]))
    report.model(input_ids=torch.tensor([[0, 1]]))
    table = embedding.table.to(torch.float64)
    table.decode(torch.tensor([0]))
    embkern.resize_token_embeddings(report.model, V + 3)
    assert calls == []
    load_model(tmp_path / "out")
    assert sum(not table.scales.is_meta for table in calls) == 1
    assert len(calls) <= 3, "the shapes in its config, which embkern and transformers parse, and its tensors"


@both_kinds
def test_a_dense_head_keeps_the_dense_table(recipe):
    report = embkern.compress(build("gpt2"), **recipe, lm_head="dense")
    assert report.model_bytes_after == report.model_bytes_before + report.compressed_bytes
    assert report.head == "dense"


@both_kinds
def test_a_directory_is_loaded_compressed_and_saved(recipe, source, text, tmp_path):
    out = tmp_path / "out"
    report = embkern.compress(source, **recipe, output=out, text=text)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "embkern_report.json"} <= set(
        os.listdir(out)
    )
    saved = read_report(out)
    assert saved == Report.model_validate(report.model_dump())
    assert saved.sentences.sentences == 4
    assert all((row.token is not None) == (row.id < 7) for row in saved.table.worst_rows), "of 7 words"
    card = (out / "README.md").read_text()
    code = card.split("```python\n")[1]
    assert code.startswith("# embkern has to be installed")
    assert str(tmp_path) not in card, "model cards are published and hold no local path"
    reloaded = T.BertForMaskedLM.from_pretrained(out)
    assert_close(outputs(reloaded), outputs(report.model), atol=1e-6, rtol=1e-5)


def test_the_facts_of_a_method_are_reported(tmp_path, source):
    report = embkern.compress(source, method="direction", rank=5, output=tmp_path / "out")
    assert report.facts["gap"] >= 0
    assert report.rows()["gap"] == f"{report.facts['gap']:.6g}"
    assert read_report(tmp_path / "out").facts == report.facts


def test_the_tiers_of_a_packed_table_are_reported():
    report = embkern.compress(build("gpt2"), **PACKED)
    assert report.rank is None
    assert [(tier.name, tier.rows) for tier in report.tiers] == [
        ("8 bits", 26), ("4 bits", 25), ("2 bits", 25), ("basis 4", 25),
    ]  # fmt: skip
    assert report.tiers[0].bytes == 26 * H
    rest = 2 * (V + 32 * H + H) + 17 * 16  # scales, basis, offset in fp16; levels
    layout = 20 * -(-V // 32) + 4 * (1 + -(-H // 32))  # directory, tiers
    assert report.compressed_bytes == sum(tier.bytes for tier in report.tiers) + rest + layout
    assert report.dtype == "float16"
    shown = report.rows()
    assert (shown["method"], shown["rows at 2 bits"]) == ("quantize, 4 tiers", "25 (200 bytes)")


def test_files_of_sentence_transformers_are_copied(source, tmp_path):
    (source / "modules.json").write_text("[]")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    (source / "notes.bin").write_text("left behind")
    embkern.compress(source, **SVD, output=tmp_path / "out")
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == "{}"
    assert (tmp_path / "out" / "modules.json").exists()
    assert not (tmp_path / "out" / "notes.bin").exists()


def test_arguments_of_the_autoencoder_are_passed_on(source, tmp_path):
    report = embkern.compress(
        source,
        method="autoencoder",
        rank=4,
        epochs=2,
        batch_size=16,
        log=tmp_path / "log",
        checkpoint=tmp_path / "c.pt",
        progress=False,
    )
    assert report.recipe.options == {"epochs": 2, "batch_size": 16}
    assert len((tmp_path / "log").read_text().splitlines()) == 2
    assert (tmp_path / "c.pt").exists()


@both_kinds
def test_export_writes_a_dense_model(recipe, source, tmp_path):
    report = embkern.compress(source, **recipe, output=tmp_path / "small")
    embkern.export_dense(tmp_path / "small", tmp_path / "dense2")
    config = json.loads((tmp_path / "dense2" / "config.json").read_text())
    assert "quantization_config" not in config
    ordinary = T.BertForMaskedLM.from_pretrained(tmp_path / "dense2")
    assert type(ordinary.get_input_embeddings()) is torch.nn.Embedding
    assert_close(outputs(ordinary), outputs(report.model), atol=1e-6, rtol=1e-5)
    assert (tmp_path / "dense2" / "tokenizer.json").exists()
    with pytest.raises(ValueError, match="expected one compressed by embkern, got a dense one"):
        embkern.export_dense(source, tmp_path / "x")


def test_frequencies_come_from_counts_text_vocabulary_or_ids(text, tmp_path):
    tokenizer = word_tokenizer()
    prior = vocabulary_prior(tokenizer, V)
    read = count_tokens(text.read_text().splitlines(), tokenizer)
    read.save(tmp_path / "counts")

    def mixed(counts):
        return expected_frequencies(counts, prior, strength=COMPRESSION_STRENGTH)

    for counts, count_text, expected, source in (
        (None, None, prior, "the order of the vocabulary"),
        (tmp_path / "counts", None, mixed(read), "7 tokens of 4 texts, and the order"),
        (read, None, mixed(read), "7 tokens of 4 texts"),
        (None, text, mixed(read), "7 tokens of 4 texts"),
        (read, [text, text], mixed(read + read + read), "21 tokens of 12 texts"),
        (torch.arange(V), None, torch.arange(V).double() / sum(range(V)), "as given"),
    ):
        got, said = token_frequencies(V, counts, count_text, tokenizer, progress=False)
        assert torch.equal(got, expected), said
        assert said.startswith(source)
    got, said = token_frequencies(V, None, None, None)
    assert torch.equal(got, vocabulary_prior(None, V))
    assert "no tokenizer" in said


def test_counts_reach_the_method_and_the_report(source, text, monkeypatch):
    given = []
    method = embkern.methods.METHODS["svd"]
    weighted = method._replace(
        compress=lambda *a, counts: given.append(counts) or method.compress(*a), weighted=True
    )
    monkeypatch.setitem(embkern.methods.METHODS, "svd", weighted)
    counts = torch.zeros(V)
    counts[3] = 9
    report = embkern.compress(source, **SVD, counts=counts)
    assert given[0].tolist() == (counts / 9).tolist()
    assert report.counts == report.rows()["token frequencies"] == "as given"
    rows = [
        load_model(source).get_input_embeddings().weight[3],
        report.model.get_input_embeddings().weight[3],
    ]
    error = 1 - torch.cosine_similarity(*rows, dim=0).item()
    assert report.table.weighted_direction_error == pytest.approx(error, abs=1e-6)
    assert embkern.compress(source, **SVD, count_text=text).counts.startswith("7 tokens of 4 texts")


def test_counts_on_the_command_line(source, text, tmp_path, monkeypatch, capsys):
    count_tokens(["red"], word_tokenizer()).save(tmp_path / "counts")
    flags = ["--counts", tmp_path / "counts", "--count-text", text, "--count-text", text]
    size = ["--method", "svd", "--rank", 4]
    command = ["embkern", "compress", source, "-o", tmp_path / "out", *size, *flags]
    monkeypatch.setattr("sys.argv", [*map(str, command), "--json"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    report = json.loads(capsys.readouterr().out)
    assert report["counts"].startswith("15 tokens of 9 texts")
    assert report["table"]["weighted_direction_error"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(counts=torch.ones(V - 1)), r"counts: expected 101 finite numbers, .* got shape \(100,\)"),
        (dict(counts=torch.zeros(V)), "counts: expected 101 finite numbers, none negative and not all 0"),
        (dict(counts=-torch.ones(V)), "values from -1.0 to -1.0"),
        (dict(counts=torch.full((V,), float("nan"))), "values from nan to nan"),
        (dict(counts=torch.ones(V), count_text="x"), "counts, count_text: expected frequencies or text"),
        (dict(count_text="./none.txt"), "expected a file, a directory or a data set, found none"),
        (dict(counts="./none"), "expected a file of token counts, found none"),
    ],
)
def test_bad_counts_are_named(source, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        embkern.compress(source, **SVD, **arguments)


def test_a_tokenizer_may_be_given_by_its_directory(source, tmp_path):
    reports = [embkern.compress(build("bert"), **SVD, tokenizer=each) for each in (word_tokenizer(), source)]
    assert reports[0].table == reports[1].table
    assert any(row.token is not None for row in reports[1].table.worst_rows)
    with pytest.raises(FileNotFoundError, match="tokenizer: expected a directory or name with one"):
        embkern.compress(build("bert"), **SVD, tokenizer=tmp_path)


def test_counts_and_tokenizers_of_other_models_are_refused(source, text):
    other = T.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer().backend_tokenizer,
        pad_token="[PAD]",
        additional_special_tokens=["<x>"],
    )
    read = count_tokens(["red"], other)
    with pytest.raises(ValueError, match="counts: expected those of the model's tokenizer"):
        embkern.compress(source, **SVD, counts=read)
    with pytest.raises(ValueError, match="it belongs to another model"):
        embkern.compress(tiny_bert(vocab_size=5), **SVD, tokenizer=word_tokenizer())
    with pytest.raises(ValueError, match="count_text: expected a tokenizer with it"):
        embkern.compress(build("gpt2"), **SVD, count_text=text)
    with pytest.raises(ValueError, match="rank: expected a ratio with method 'quantize', got 3; .* svd"):
        embkern.compress(source, method="quantize", rank=3)


def test_arguments_are_checked_before_any_work(source, tmp_path):
    for arguments, error, message in (
        (dict(ratio=0.5), ValueError, "ratio: expected at least 1"),
        (dict(rank=0), ValueError, "rank: expected at least 1, got 0"),
        (dict(method="svd", rank=33), ValueError, "rank: expected 1 <= rank <= H = 32, got 33"),
        (dict(method="svd", ratio=900), ValueError, "leaves no room for rank 1 .* the highest that fits is"),
        (dict(method="autoencoder", ratio=2, epochs=0), ValueError, "autoencoder: epochs"),
        (dict(ratio=2, text=tmp_path / "none"), FileNotFoundError, "text: expected a text file"),
        (
            dict(recipe=embkern.Recipe(ratio=2.0), rank=3, lm_head="dense"),
            ValueError,
            "a recipe or rank, lm_head",
        ),
        (dict(rank=3, method="svd", log=tmp_path / "l"), ValueError, "checkpoint, log: expected with method"),
        (
            dict(method="autoencoder", rank=3, log=tmp_path / "no" / "l"),
            FileNotFoundError,
            "log: expected a file in a directory",
        ),
    ):
        with pytest.raises(error, match=message):
            embkern.compress(source, output=tmp_path / "out", progress=False, **arguments)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_in_the_table(bad):
    model = build("bert")
    with torch.no_grad():
        model.get_input_embeddings().weight[[5, 9]] = bad
    with pytest.raises(
        ValueError, match=r"table: expected finite values, got NaN or infinity in 2 row\(s\): 5, 9"
    ):
        embkern.compress(model, **SVD)
    assert not isinstance(model.get_input_embeddings(), CompressedEmbedding)


def test_zero_rows_and_a_vocabulary_of_one():
    model = build("bert")
    with torch.no_grad():
        model.get_input_embeddings().weight[3:9] = 0
    report = embkern.compress(model, **SVD)
    assert not model.get_input_embeddings().weight[3:9].any()
    assert report.table.direction_error < 1
    single = tiny_bert(vocab_size=1)
    assert embkern.compress(single, method="svd", rank=1).table.direction_error == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="cannot be factorised smaller"):
        embkern.compress(tiny_bert(vocab_size=1), method="svd", ratio=1)


def test_a_tied_head_with_an_activation_is_refused_before_training(source, tmp_path):
    with pytest.raises(ValueError, match="lm_head: a tied head cannot decode through activation 'elu'"):
        embkern.compress(source, method="autoencoder", rank=4, activation="elu", epochs=10**9, progress=False)

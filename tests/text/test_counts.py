"""Token counts: counting, sums, round trips through files, and refusal of invalid files."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from embkern.text.counts import TokenCounts, count_tokens, fingerprint
from embkern.text.prior import vocabulary_prior
from tests.example_tokenizers import LINES, WORDS, byte_level, of, prior_of, wordpiece


@pytest.mark.parametrize("make", [wordpiece, byte_level])
@pytest.mark.parametrize("batch_chars", [1, 1 << 18], ids=["one by one", "together"])
def test_counts_are_those_of_the_tokenizer(make, batch_chars):
    tokenizer = make()
    expected = Counter(id for line in LINES for id in tokenizer(line, truncation=False).input_ids)
    counts = count_tokens(iter([*LINES, "", " \t"]), tokenizer, batch_chars=batch_chars)
    assert {id: n for id, n in enumerate(counts.counts.tolist()) if n} == expected
    assert (counts.texts, counts.tokens, counts.vocabulary_size) == (3, expected.total(), len(tokenizer))
    assert len(counts.counts) == len(tokenizer)
    assert len(count_tokens(LINES, tokenizer, num_embeddings=500).counts) == 500


def test_special_tokens_count_once_per_text_and_nothing_is_truncated():
    tokenizer = wordpiece()
    counts = of(count_tokens(["the cats sit, the cats!"], tokenizer), tokenizer)
    assert counts == {"[CLS]": 1, "[SEP]": 1, "the": 2, "cat": 2, "##s": 2, "sit": 1, ",": 1, "!": 1}


@pytest.mark.parametrize("progress", [None, False, True])
def test_a_progress_bar_is_shown_on_a_terminal_or_on_request(capsys, progress):
    count_tokens(LINES, wordpiece(), progress=progress)
    printed, shown = capsys.readouterr()
    assert (printed, "count tokens" in shown) == ("", bool(progress))


def test_another_language_and_unknown_characters():
    tokenizer = wordpiece()
    assert of(count_tokens(["кошка 猫"], tokenizer), tokenizer) == {"[UNK]": 2, "[CLS]": 1, "[SEP]": 1}
    counts = count_tokens(["кошка 猫"], byte_level())
    assert counts.tokens == len("кошка 猫".encode()), "every byte is a token, none is lost"


@pytest.mark.parametrize("texts", [[], ["", "\n "]], ids=["none", "blank"])
def test_no_text_is_refused(texts):
    with pytest.raises(ValueError, match="texts: expected some text, got none"):
        count_tokens(texts, wordpiece())


def test_a_string_is_not_a_sequence_of_texts():
    with pytest.raises(TypeError, match="texts: expected an iterable of str"):
        count_tokens("the cat", wordpiece())


def test_a_tokenizer_of_another_model_is_refused():
    tokenizer, size = wordpiece(), len(wordpiece())
    for function in (lambda V: count_tokens(LINES, tokenizer, num_embeddings=V), prior_of(tokenizer)):
        with pytest.raises(ValueError, match=f"below the table's {size - 1} rows, got ids up to {size - 1}"):
            function(size - 1)
        with pytest.raises(ValueError, match="num_embeddings: expected at least 1, got 0"):
            function(0)
    tokenizer.add_tokens(["zebra"])  # its id is beyond the table, which is an error only if a text has it
    assert count_tokens(LINES, tokenizer, num_embeddings=size).tokens
    assert len(vocabulary_prior(tokenizer, size)) == size
    with pytest.raises(ValueError, match=f"below the table's {size} rows, got ids up to {size}"):
        count_tokens(["zebra"], tokenizer, num_embeddings=size)


def test_the_fingerprint_depends_on_the_vocabulary_alone():
    assert fingerprint(wordpiece()) == fingerprint(wordpiece())
    assert fingerprint(wordpiece()) != fingerprint(wordpiece(WORDS[::-1])), "the same tokens, other ids"
    program = "from tests.example_tokenizers import *; from embkern.text.counts import fingerprint\n"
    program += "print(fingerprint(wordpiece()))"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert other.stdout.strip() == fingerprint(wordpiece()), other.stderr


def test_counts_of_one_tokenizer_add_up():
    tokenizer = wordpiece()
    parts = [
        count_tokens([line], tokenizer, num_embeddings=V)
        for line, V in zip(LINES, (200, 300, 250), strict=True)
    ]
    total = parts[0] + parts[1] + parts[2]
    assert torch.equal(total.counts, count_tokens(LINES, tokenizer, num_embeddings=300).counts)
    assert (total.texts, total.tokens) == (3, sum(part.tokens for part in parts))
    total.check_tokenizer(tokenizer)
    other = wordpiece(WORDS[::-1])
    with pytest.raises(ValueError, match="counts: expected those of one tokenizer"):
        total + count_tokens(LINES, other)
    with pytest.raises(ValueError, match="counts: expected those of the model's tokenizer"):
        total.check_tokenizer(other)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"counts": torch.zeros(3)}, TypeError, "counts: expected int64, got torch.float32"),
        ({"counts": torch.zeros(3, 1).long()}, ValueError, r"expected shape \(V,\) .* got \(3, 1\)"),
        ({"counts": torch.zeros(0).long()}, ValueError, r"V >= 1, got \(0,\)"),
        ({"counts": torch.tensor([1, -1])}, ValueError, "expected at least 0, got less"),
        ({"texts": -1}, ValueError, "expected at least 0, got less"),
        ({"counts": torch.tensor([2**62, 2**62])}, ValueError, r"counts: expected a sum below 2\^63"),
    ],
)
def test_bad_counts_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        TokenCounts(
            **{"counts": torch.ones(2).long(), "texts": 1, "fingerprint": "", **fields}, vocabulary_size=2
        )


def test_round_trip(tmp_path, counts):
    counts.save(tmp_path / "c")
    loaded = TokenCounts.load(tmp_path / "c")
    assert torch.equal(loaded.counts, counts.counts)
    for name in ("texts", "tokens", "fingerprint", "vocabulary_size"):
        assert getattr(loaded, name) == getattr(counts, name)
    assert [path.name for path in tmp_path.iterdir()] == ["c"], "no temporary file stays"


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, counts):
    path = tmp_path / "c"
    counts.save(path)
    whole = path.read_bytes()
    for length in (0, 4, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            TokenCounts.load(path)
    with pytest.raises(FileNotFoundError, match="path: expected a file of token counts, found none"):
        TokenCounts.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.pop("format"), "expected format 'embkern.counts/1', got None"),
        (lambda t, m: m.pop("checksums"), "metadata is damaged"),
        (lambda t, m: m.update(checksums="[]"), "metadata is damaged"),
        (lambda t, m: m.update(facts="{"), "metadata is damaged"),
        (lambda t, m: m.update(facts='{"texts": 1}'), "metadata is damaged"),
        (
            lambda t, m: m.update(facts=m["facts"].replace('"texts": 3', '"texts": -3')),
            "at least 0, got less",
        ),
        (lambda t, m: t.update(extra=torch.zeros(1)), "expected counts, got"),
        (lambda t, m: t.update(counts=t["counts"] + 1), "counts was changed"),
    ],
)
def test_edited_files_are_refused(tmp_path, counts, change, message):
    path = tmp_path / "c"
    counts.save(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata.pop("header", None)  # its checksum would fail first
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=message):
        TokenCounts.load(path)

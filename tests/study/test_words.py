"""The words whose neighbours are listed."""

from __future__ import annotations

import pytest
import torch

from tests.study import REQUIRED

for package in REQUIRED:
    pytest.importorskip(package)
from embkern.study.words import find_words, typical_words
from tests.study.tiny_models import tokenizer


def test_typical_words_go_from_frequent_to_rare():
    names = ["[CLS]", "##ing", "the", "of", "word", "ab", "zyx", "Ġno"]
    made = tokenizer()
    made.convert_ids_to_tokens = lambda ids: [names[i] if i < len(names) else None for i in ids]
    frequencies = torch.arange(10, 0, -1, dtype=torch.float64)
    assert typical_words(frequencies, made) == [7], "a vocabulary that marks words has no others"
    names[7] = "no"
    assert typical_words(frequencies, made) == [2, 4, 6]
    assert typical_words(frequencies, None) == [0, 1, 3, 6, 9]


def test_words_are_found_with_and_without_a_mark():
    made = tokenizer()
    made.get_vocab = lambda: {"Ġred": 3, "red": 4, "green": 5}
    assert find_words(["red", "green", "Ġred"], made) == [3, 5]

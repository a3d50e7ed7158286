"""Fixtures of the tests of texts and frequencies."""

from __future__ import annotations

import pytest


@pytest.fixture
def counts():
    """Counts of three short texts by a WordPiece tokenizer."""
    pytest.importorskip("transformers")
    from embkern.text.counts import count_tokens
    from tests.example_tokenizers import LINES, wordpiece

    return count_tokens(LINES, wordpiece(), num_embeddings=140)

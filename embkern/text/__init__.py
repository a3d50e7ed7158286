"""Reading texts, counting their tokens, and estimating token frequencies."""

from .counts import CountSummary, TokenCounts, count_tokens
from .frequencies import expected_frequencies, token_frequencies
from .prior import vocabulary_prior
from .reading import read_texts

__all__ = [
    "CountSummary",
    "TokenCounts",
    "count_tokens",
    "expected_frequencies",
    "read_texts",
    "token_frequencies",
    "vocabulary_prior",
]

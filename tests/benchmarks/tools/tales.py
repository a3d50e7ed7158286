"""Short texts of few words, the same in every run."""

import random

WORDS = """
    the of and in to a was for on cat river dog garden horse mountain otter harbour raven kitchen whale forest
    lizard station spider library badger meadow falcon island
"""


def tale(seed: int) -> str:
    """Thirty words; the first ones of the list are in most places."""
    draw = random.Random(seed)
    words = WORDS.split()
    words = [words[int(len(words) * draw.random() ** 2)] for _ in range(30)]
    return f"Number {seed}: {' '.join(words)}."

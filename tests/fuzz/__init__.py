"""Properties of every op and every file format, checked on drawn cases.

A property is a test with one argument, a case: a dict of plain values that a generator function makes from a
``Random``. Under ``make test`` hypothesis draws the cases, about 200 in all, shrinks a failing one and prints
how to reproduce it. With ``EMBKERN_FUZZ_SECONDS`` set (``make fuzz``) hypothesis draws the first cases of
every property, and seeded generators draw the rest: they make the same kind of case at a tenth of the cost.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

Case = dict[str, Any]


def fuzz(generate: Callable[[Random], Case]) -> Callable[[Callable[[Case], None]], Callable[[], None]]:
    """Turn a property into a test of the cases that ``generate`` makes."""

    def decorate(check: Callable[[Case], None]) -> Callable[[], None]:
        test = given(case=st.randoms(use_true_random=False).map(generate))(check)
        test.generate = generate
        return test

    return decorate


def often(random: Random, usual: Any, *others: Any) -> Any:
    """Return ``usual`` in two of three draws, otherwise one of the others."""
    return usual if random.randrange(3) else random.choice(others)

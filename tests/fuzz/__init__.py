"""Properties of every op and every file format, checked on drawn cases.

A property is a test with one argument, a case: a dict of plain values that a function made of a ``Random``.
Under ``make test`` hypothesis draws the cases, some 200 in all, shrinks what fails and prints how to draw it
again. With ``EMBKERN_FUZZ_SECONDS`` set (``make fuzz``) hypothesis draws the first cases of every property,
and seeded generators the rest: they make the same cases at a tenth of hypothesis's cost.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

Case = dict[str, Any]


def fuzz(generate: Callable[[Random], Case]) -> Callable[[Callable[[Case], None]], Callable[[], None]]:
    """Make a test of a property, with cases that ``generate`` makes."""

    def decorate(check: Callable[[Case], None]) -> Callable[[], None]:
        test = given(case=st.randoms(use_true_random=False).map(generate))(check)
        test.generate = generate
        return test

    return decorate


def often(random: Random, usual: Any, *others: Any) -> Any:
    """Return ``usual`` in two of three cases, else one of the others."""
    return usual if random.randrange(3) else random.choice(others)

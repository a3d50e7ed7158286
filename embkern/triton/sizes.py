"""Arithmetic of launches on the host; the functions of these names in triton take 2 us a call."""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """Return ``a / b`` rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is not below n, 1 for n = 0."""
    return 1 << max(n - 1, 0).bit_length()

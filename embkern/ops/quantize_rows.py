"""quantize_rows: scalar codes of rows, with the best of some scales for each row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from .backends import Backend, select
from .library import define, needs_autograd, overload
from .packed_codes import GROUP, LEVEL_BITS, MAX_BITS
from .reference.quantize_rows import LEVEL_STEP as LEVEL_STEP


def _fake(
    values: Tensor,
    spread: Tensor | None,
    bits: Tensor,
    levels: Tensor,
    steps: Tensor,
    factors: Tensor,
    needs_codes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    count, width = values.shape
    codes = values.new_empty((count if needs_codes else 0, width), dtype=torch.uint8)
    return codes, values.new_empty(count), values.new_empty(count)


define(
    "quantize_rows",
    "(Tensor values, Tensor? spread, Tensor bits, Tensor levels, Tensor steps, Tensor factors, "
    "bool needs_codes) -> (Tensor, Tensor, Tensor)",
    backends=("native",),
    fake=_fake,
)

_FORWARD: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    "native": overload("quantize_rows", "native"),
    "torch": reference.quantize_rows,
}


def quantize_rows(
    values: Tensor,
    spread: Tensor | None,
    bits: Tensor,
    levels: Tensor,
    steps: Tensor,
    factors: Tensor,
    *,
    needs_codes: bool,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise rows value by value and choose the best of some scales for each row.

    A packed table stores these codes from 5 bits on. Up to 4 bits it stores those of ``quantize_trellis``;
    there, scalar codes serve to find the scale, because they take a tenth of the time.

    For every factor f, the codes are those of the levels nearest to ``values / (rms * f)`` with ``rms =
    values.square().mean(1).sqrt()``. With ``d = decoded * spread`` and ``x = values * spread``, the factor
    with the largest ``projection = (x * d).sum(1) / d.norm(dim=1)`` is chosen, and the scale is ``(x *
    d).sum(1) / d.square().sum(1)``.

    Args:
        values: (N, 32 G) float32, without gradient.
        spread: (32 G,) float32, the divisors of the values; None for ones.
        bits: (G,) uint8, bits per value of each group of 32 values, 0 to 8.
        levels: (4, 16) int16, in steps of 2^-12: the ascending levels of codes of 1 to 4 bits.
        steps: (9,) float32: the step of uniform codes of 5 to 8 bits, at the index of their bits.
        factors: (F,) float32, positive.
        needs_codes: whether the codes are returned.
        backend: ``native`` or ``torch``; None takes the best.

    Returns:
        codes (N, 32 G) uint8, empty unless needed; scales (N,); projections (N,). A row of zeros has
        projection 0.

    Raises:
        TypeError: a dtype is not the one above.
        ValueError: shapes or devices do not fit, there is no group or no factor, bits are above 8, values or
            spread require a gradient, or ``backend`` is unknown.
        RuntimeError: the requested backend cannot serve this call.
    """
    check_rows_to_quantize(values, spread, bits, most_bits=MAX_BITS)
    width = GROUP * len(bits)
    for name, tensor, dtype, shape in (
        ("levels", levels, torch.int16, (LEVEL_BITS, 2**LEVEL_BITS)),
        ("steps", steps, torch.float32, (9,)),
        ("factors", factors, torch.float32, (max(1, factors.numel()),)),
        ("spread", spread, torch.float32, (width,)),
    ):
        check_tensor(name, tensor, dtype, shape, values.device)
    chosen = select("quantize_rows", values.device.type, values.dtype, backend)
    contiguous = (
        None if each is None else each.contiguous() for each in (values, spread, bits, levels, steps, factors)
    )
    return _FORWARD[chosen](*contiguous, needs_codes)


def check_rows_to_quantize(values: Tensor, spread: Tensor | None, bits: Tensor, most_bits: int) -> None:
    """Raise unless values (N, 32 G) and bits (G,) fit each other and need no gradient."""
    if values.dtype != torch.float32:
        raise TypeError(f"values: expected dtype torch.float32, got {values.dtype}")
    check_tensor("bits", bits, torch.uint8, (max(1, bits.numel()),), values.device)
    width = GROUP * len(bits)
    if values.dim() != 2 or values.shape[1] != width:
        raise ValueError(
            f"values: expected shape (N, {width}), 32 columns for each of {len(bits)} groups in bits, "
            f"got {tuple(values.shape)}"
        )
    if needs_autograd(values, spread):
        raise ValueError("values, spread: expected tensors without gradient, got one that requires it")
    if not bits.is_meta and int(bits.max()) > most_bits:
        raise ValueError(f"bits: expected up to {most_bits}, got {int(bits.max())}")


def check_tensor(
    name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    """Raise unless a tensor, if there is one, has this dtype, shape and device."""
    if tensor is None:
        return
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device} as in values, got {tensor.device}")

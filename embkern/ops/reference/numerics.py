"""What the definitions share: the dtype of sums, and a decorator that disables autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over ``dtype`` are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sums_dtype(hidden: Tensor, scales: Tensor) -> torch.dtype:
    """Return the dtype of losses and gradients of a head."""
    return torch.promote_types(accumulation_dtype(hidden.dtype), accumulation_dtype(scales.dtype))


def widened_on_cpu(tensor: Tensor) -> Tensor:
    """Return a tensor on CPU in the dtype of sums over it; others have tensor cores for their dtype."""
    return tensor.to(accumulation_dtype(tensor.dtype)) if tensor.is_cpu else tensor


def autocast_off(function: Callable[..., T]) -> Callable[..., T]:
    """Keep autocast from narrowing the products: the result has the factors' dtype, as with F.embedding."""

    @functools.wraps(function)
    def call(first: Tensor, *args: Any, **options: Any) -> T:
        device_type = first.device.type
        # is_autocast_enabled raises for a device without autocast, such as meta. The compiler of torch 2.10
        # cannot trace is_autocast_available, and compiles nothing for such a device.
        has_autocast = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
        if has_autocast and torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return function(first, *args, **options)
        return function(first, *args, **options)

    return call

"""What the cross-entropies of heads share: their options, the checks of labels, reductions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .backends import DTYPES

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


def check_options(label_smoothing: float, softcap: float | None, reduction: str) -> None:
    """Raise ValueError for an option out of range."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected 0 to 1, got {label_smoothing}")
    if softcap is not None and not 1e-30 <= softcap <= 1e30:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def check_arguments(
    hidden: Tensor, labels: Tensor, bias: Tensor | None, vocabulary: int, ignore_index: int
) -> None:
    """Raise unless hidden, labels and bias fit each other and a table of ``vocabulary`` rows.

    Labels on CPU are read. Those on CUDA have a device assertion.
    """
    if hidden.dtype not in DTYPES:
        raise TypeError(f"hidden: expected a floating-point dtype, got {hidden.dtype}")
    if hidden.dim() == 0 or hidden.shape[-1] < 1:
        raise ValueError(f"hidden: expected shape (*, H) with H >= 1, got {tuple(hidden.shape)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels: expected dtype torch.int32 or torch.int64, got {labels.dtype}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels: expected shape {tuple(hidden.shape[:-1])}, got {tuple(labels.shape)}")
    if bias is not None:
        if bias.dtype not in DTYPES:
            raise TypeError(f"bias: expected a floating-point dtype, got {bias.dtype}")
        if tuple(bias.shape) != (vocabulary,):
            raise ValueError(f"bias: expected shape ({vocabulary},), got {tuple(bias.shape)}")
    for name, tensor in (("labels", labels), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: expected device {hidden.device} as in hidden, got {tensor.device}")
    if labels.is_cpu and not torch.compiler.is_compiling():
        wrong = _wrong(labels, vocabulary, ignore_index).reshape(-1).nonzero()
        if len(wrong):
            place = int(wrong[0])
            raise IndexError(
                f"labels: expected 0 <= label < {vocabulary} or {ignore_index}, "
                f"got {int(labels.reshape(-1)[place])} at flat position {place}"
            )
    elif labels.is_cuda:
        torch._assert_async(~_wrong(labels, vocabulary, ignore_index).any())


def _wrong(labels: Tensor, vocabulary: int, ignore_index: int) -> Tensor:
    return ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)


def reduced(losses: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Reduce losses (N,), which are 0 where labels are ignored, as ``F.cross_entropy`` does."""
    if reduction == "none":
        return losses.view(labels.shape)
    total = losses.sum()
    return total if reduction == "sum" else total / (labels != ignore_index).sum()


def as_cap(softcap: float | None) -> float:
    """Return the number that stands for a softcap in the schemas."""
    return 0.0 if softcap is None else float(softcap)

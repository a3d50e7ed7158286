"""The problems of the cross-entropy that `aot.py` compiles, on tensors of the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops.reference import accumulation_dtype
from ...ops.reference.cross_entropy import Head, LossOptions
from ..launch import Launch
from ..tiles import Device
from .fold import fold_launch
from .gradients import Upstream, gradient_launch, is_fused, logit_gradients_launch


@dataclass(frozen=True)
class HeadShape:
    """One problem: N states of K columns, V rows; with everything: constant, bias, smoothing and a cap."""

    N: int
    K: int
    V: int = 128256
    dtype: torch.dtype = torch.bfloat16
    everything: bool = True

    def __str__(self) -> str:
        """Return it in one line."""
        extra = " all" if self.everything else ""
        return f"N={self.N} K={self.K}{extra} {str(self.dtype).removeprefix('torch.')}"


# Factors of usual ranks, odd ones, decoded rows; few states; every dtype.
HEAD_SHAPES = (
    *(
        HeadShape(8192, K, everything=everything)
        for K in (64, 128, 256, 768, 4096)
        for everything in (True, False)
    ),
    *(HeadShape(8192, K) for K in (16, 75, 127, 255, 577)),
    *(HeadShape(7, K) for K in (128, 768)),
    HeadShape(8192, 128, dtype=torch.float16),
    *(HeadShape(8192, K, dtype=dtype) for K in (128, 768) for dtype in (torch.float32, torch.float64)),
    HeadShape(8192, 75, dtype=torch.float32),
)


def head_launches(shape: HeadShape, device: Device) -> Iterator[Launch]:
    """Yield the launches of the forward, and those of the backward."""
    N, K, V, dtype = shape.N, shape.K, shape.V, shape.dtype
    sums = accumulation_dtype(dtype)

    def tensor(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    options = LossOptions(-100, 0.1, 30.0) if shape.everything else LossOptions(-100, 0.0, 0.0)
    constant, bias = (tensor(N), tensor(V)) if shape.everything else (None, None)
    head = Head(tensor(N, K), tensor(N, dtype=torch.int64), V, constant, bias, options)
    rows, upstream = tensor(V, K), Upstream.of(head, tensor(N, dtype=sums), tensor(N, 3, dtype=sums))
    yield fold_launch(head, upstream.places, 0, rows, tensor(N, dtype=sums), device)[0]
    yield logit_gradients_launch(upstream, 0, rows, device)[0]
    if is_fused(head.states):
        for of_states in (True, False):
            yield gradient_launch(upstream, rows, of_states, dtype, device)[0]

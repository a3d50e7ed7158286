"""Logits over a packed table: ``F.linear(hidden, table)``, decoded a piece at a time, never a dense table."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..ops.backends import Backend
from ..ops.gather_decode import gather_decode
from ..ops.library import apply, differentiable_once, needs_autograd
from ..ops.packed_format import GROUP, tiers_of_rows
from ..ops.reference import accumulation_dtype

_ROWS = 512  # decoded at a time: 0.8 MB at H = 384, which L2 holds
_FEW = 16  # hidden states for which products with the values of the codes cost less than decoding


def packed_logits(
    hidden: Tensor, tensors: tuple[Tensor | None, ...], *, backend: Backend | None = None
) -> Tensor:
    """Logits of a head that is tied to a packed table: ``F.linear(hidden, gather_decode(arange(V), ...))``.

    The result has the dtype of ``hidden``, under autocast that of autocast. Gradients flow to hidden, scales,
    basis and offset, once (no double backward); the backward decodes again.

    Args:
        hidden: (``*``, H).
        tensors: records, directory, tiers, levels, scales, basis and offset, as ``gather_decode`` takes them.
        backend: of ``gather_decode``.

    Returns:
        (``*``, V).
    """
    if torch.is_autocast_enabled(hidden.device.type):  # as F.linear would
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    flat = hidden.reshape(-1, hidden.shape[-1])
    scales, basis, offset = tensors[4:]
    assert scales is not None
    with torch.autocast(hidden.device.type, enabled=False):
        if needs_autograd(flat, scales, basis, offset):
            logits = apply(_PackedLogits, flat, *tensors, backend)
        elif len(flat) <= _FEW and basis is not None and flat.is_cpu and not torch.compiler.is_compiling():
            logits = _by_values(flat, tensors, backend)
        else:
            logits = _by_rows(flat, tensors, backend)
    return logits.view(*hidden.shape[:-1], len(scales))


def _by_rows(hidden: Tensor, tensors: tuple[Any, ...], backend: Backend | None) -> Tensor:
    """Logits (N, V) of hidden states (N, H): a product with rows."""
    scales = tensors[4]
    logits = hidden.new_empty(len(hidden), len(scales))
    ids = torch.arange(len(scales), device=scales.device)
    for some, columns in zip(ids.split(_ROWS), logits.split(_ROWS, 1), strict=True):
        rows = gather_decode(some, *tensors, embedding_dim=hidden.shape[1], backend=backend)
        columns.copy_(hidden @ rows.to(hidden.dtype).t())
    return logits


def _by_values(hidden: Tensor, tensors: tuple[Any, ...], backend: Backend | None) -> Tensor:
    """Logits of few hidden states: ``(h @ basis.T) @ values.T`` where a row is coefficients of the basis.

    To decode a row of 384 from 128 coefficients takes some 10 times as long as the coefficients do.
    """
    *codes, scales, basis, offset = tensors
    decode = _Values(codes, scales, backend)
    factors = [
        F.pad(each, (0, decode.width))[:, : decode.width]
        for each in (hidden, hidden @ basis.to(hidden.dtype).t())
    ]
    logits = hidden.new_empty(len(hidden), len(scales))
    ids = torch.arange(len(scales))
    for some, columns in zip(ids.split(_ROWS), logits.split(_ROWS, 1), strict=True):
        values = decode(some).to(hidden.dtype).t()
        torch.where(decode.in_basis[some], factors[1] @ values, factors[0] @ values, out=columns)
    if offset is not None:
        logits += hidden @ offset.to(hidden.dtype).unsqueeze(1)
    return logits


class _Values:
    """What the codes stand for, times the rows' scales: (N, 32 G) for ids, whether a row or coefficients."""

    def __init__(self, codes: Any, scales: Tensor, backend: Backend | None) -> None:
        self.records, self.directory, tiers, self.levels = codes
        self.scales, self.backend = scales, backend
        self.width = GROUP * (tiers.shape[1] - 1)
        self.tiers = torch.cat([torch.zeros_like(tiers[:, :1]), tiers[:, 1:]], 1)  # no tier has a basis
        self.in_basis = tiers[:, 0].bool()[tiers_of_rows(self.directory)[: len(scales)]]

    def __call__(self, ids: Tensor) -> Tensor:
        codes = (self.records, self.directory, self.tiers, self.levels)
        return gather_decode(ids, *codes, self.scales, embedding_dim=self.width, backend=self.backend)


class _PackedLogits(Function):
    """Autograd of logits by rows."""

    @staticmethod
    def forward(hidden: Tensor, *args: Any) -> Tensor:
        *tensors, backend = args
        return _by_rows(hidden, tuple(tensors), backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        hidden, *codes, scales, basis, offset = ctx.saved_tensors
        floats = (hidden, scales, basis, offset)
        needs = [ctx.needs_input_grad[i] for i in (0, 5, 6, 7)]
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            sums = _gradients(grad, hidden, codes, scales, basis, offset, needs, ctx.backend)
        found = [
            None if total is None else differentiable_once(total.to(each.dtype), grad, *floats)
            for total, each in zip(sums, floats, strict=True)
        ]
        return found[0], None, None, None, None, *found[1:], None


def _gradients(
    grad: Tensor,
    hidden: Tensor,
    codes: list[Tensor],
    scales: Tensor,
    basis: Tensor | None,
    offset: Tensor | None,
    needs: list[bool],
    backend: Backend | None,
) -> list[Any]:
    """Gradients of hidden, scales, basis and offset where they are needed, summed in fp32 or better."""
    floats = (hidden, scales, basis, offset)
    tensors: tuple[Any, ...] = (*codes, scales, basis, offset)
    wide: list[Any] = [each if each is None else each.to(accumulation_dtype(each.dtype)) for each in floats]
    sums: list[Any] = [torch.zeros_like(w) if needed else None for w, needed in zip(wide, needs, strict=True)]
    options: dict[str, Any] = {"embedding_dim": hidden.shape[1], "backend": backend}
    values = _Values(codes, wide[1], backend) if needs[2] else None
    unscaled: tuple[Any, ...] = (*codes, torch.ones_like(wide[1]), wide[2])
    ids = torch.arange(len(scales), device=scales.device)
    for some, columns in zip(ids.split(_ROWS), grad.split(_ROWS, 1), strict=True):
        if needs[0]:
            rows = gather_decode(some, *tensors, **options)
            sums[0] += columns @ rows.to(grad.dtype)
        if not any(needs[1:]):
            continue
        upstream = (columns.t() @ hidden).to(wide[1].dtype)  # gradient of the rows
        if needs[1]:
            sums[1][some] = (gather_decode(some, *unscaled, **options) * upstream).sum(1)
        if values is not None:
            size = min(len(wide[2]), values.width)
            coefficients = values(some)[:, :size] * values.in_basis[some].unsqueeze(1)
            sums[2][:size] += coefficients.t() @ upstream
        if needs[3]:
            sums[3] += upstream.sum(0)
    return sums

"""Problems of heads: logits of few hidden states; cross-entropies with gradients and every option."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embkern.ops import low_rank_cross_entropy, packed_cross_entropy, reference
from embkern.tables.packed import TENSORS

from .place import Device
from .problems import Problem, Shape, _differentiated, _normal, _packed_table

IGNORED = 3
OPTIONS: dict[str, Any] = dict(
    ignore_index=IGNORED, label_smoothing=0.1, softcap=5.0, reduction="none"
)  # Without a cap, the exact gradient of the offset is 0.


def _plain_losses(logits: Tensor, labels: Tensor) -> Tensor:
    options = {name: value for name, value in OPTIONS.items() if name != "softcap"}
    capped = OPTIONS["softcap"] * torch.tanh(logits / OPTIONS["softcap"])
    return F.cross_entropy(capped, labels, **options).to(reference.accumulation_dtype(logits.dtype))


def _states(generator: torch.Generator, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    labels = (torch.rand(shape.N, generator=generator, device=generator.device) * shape.V).long()
    labels[::5] = IGNORED
    floats = (_normal(generator, *size) for size in ((shape.N, shape.H), (shape.V,), (shape.N,)))
    return (labels, *floats)  # type: ignore[return-value]


def low_rank_loss(
    backend: Any, shape: Shape, dtype: torch.dtype, place: Device, generator: torch.Generator
) -> Problem:
    """low_rank_cross_entropy: losses, and the gradients of hidden, codes, basis, offset and bias."""
    N, H, r, V = shape.N, shape.H, shape.r, shape.V
    labels, hidden, bias, upstream = _states(generator, shape)
    codes, basis = 3 * _normal(generator, V, r) / (r * H) ** 0.5, _normal(generator, r, H)
    offset = _normal(generator, H) / H**0.5
    leaves = [each.to(dtype) for each in (hidden, codes, basis, offset, bias)]

    def plain(cast: torch.dtype) -> tuple[Tensor, ...]:
        def losses(hidden: Tensor, codes: Tensor, basis: Tensor, offset: Tensor, bias: Tensor) -> Tensor:
            logits = hidden @ basis.t() @ codes.t() + (hidden @ offset)[:, None] + bias
            return _plain_losses(logits, labels)

        return _differentiated(losses, leaves, cast, upstream)

    def call() -> tuple[Tensor, ...]:
        def losses(hidden: Tensor, codes: Tensor, basis: Tensor, offset: Tensor, bias: Tensor) -> Tensor:
            tensors = (hidden, labels, codes, basis, offset)
            return low_rank_cross_entropy(*tensors, bias=bias, backend=backend, **OPTIONS)

        return _differentiated(losses, leaves, dtype, upstream)

    products = 3 * (N * V * r + 2 * N * H * r)  # the logits, and the gradients of both factors
    least_bytes = 3 * sum(each.nbytes for each in leaves) + labels.nbytes
    return Problem(call, plain, [labels, *leaves, upstream], least_bytes, 2.0 * products)


def packed_loss(
    backend: Any, shape: Shape, dtype: torch.dtype, place: Device, generator: torch.Generator
) -> Problem:
    """packed_cross_entropy: losses, and the gradients of hidden, scales, basis, offset and bias."""
    N, H, K, V = shape.N, shape.H, shape.r, shape.V
    labels, hidden, bias, upstream = _states(generator, shape)
    table = _packed_table(V, H, K, dtype, place.type)
    codes = [getattr(table, name) for name in TENSORS[:4]]
    floats = [getattr(table, name).clone() for name in TENSORS[4:]]
    rows = reference.gather_decode_forward(
        torch.arange(min(V, 1000), device=place.type), *codes, *floats, H, 1.0
    )
    hidden = 3 * hidden / (hidden @ rows.float().t()).std()  # logits of a few units
    leaves = [each.to(dtype) for each in (hidden, *floats, bias)]

    def plain(cast: torch.dtype) -> tuple[Tensor, ...]:
        tensors: list[Any] = [each.to(cast) for each in leaves]
        hidden, *factors, bias = tensors
        ids = torch.arange(V, device=labels.device)
        decoded = reference.gather_decode_forward(ids, *codes, *factors, H, 1.0)
        value, of_hidden, of_rows, of_bias = _differentiated(
            lambda hidden, rows, bias: _plain_losses(hidden @ rows.t() + bias, labels),
            [hidden, decoded, bias],
            cast,
            upstream,
        )
        given = (of_rows, ids, *codes, *factors[:2], 1.0, -1, True, True, True)
        return value, of_hidden, *reference.gather_decode_backward(*given), of_bias

    def call() -> tuple[Tensor, ...]:
        def losses(hidden: Tensor, *factors: Tensor) -> Tensor:
            tensors: list[Any] = [hidden, labels, *codes, *factors[:3]]
            return packed_cross_entropy(*tensors, bias=factors[3], backend=backend, **OPTIONS)

        return _differentiated(losses, leaves, dtype, upstream)

    products = 3 * N * V * H
    least_bytes = 3 * sum(each.nbytes for each in leaves) + labels.nbytes + 2 * codes[0].nbytes
    return Problem(call, plain, [labels, *leaves, upstream], least_bytes, 2.0 * products)


def packed_states(
    backend: Any, shape: Shape, dtype: torch.dtype, place: Device, generator: torch.Generator
) -> Problem:
    """packed_logits: the forward."""
    N, H, K, V = shape.N, shape.H, shape.r, shape.V
    table = _packed_table(V, H, K, dtype, place.type)
    codes = [getattr(table, name) for name in TENSORS[:4]]
    floats = [getattr(table, name).clone() for name in TENSORS[4:]]
    hidden = _normal(generator, N, H).to(dtype)

    def plain(cast: torch.dtype) -> tuple[Tensor, ...]:
        wide: list[Any] = [each.to(cast) for each in floats]
        ids = torch.arange(V, device=hidden.device)
        return (F.linear(hidden.to(cast), reference.gather_decode_forward(ids, *codes, *wide, H, 1.0)),)

    def call() -> tuple[Tensor, ...]:
        return (place.op("packed_logits_forward", backend)(hidden, *codes, *floats),)

    least_bytes = sum(each.nbytes for each in (*codes, *floats, hidden)) + N * V * dtype.itemsize
    return Problem(call, plain, [hidden], least_bytes, 2.0 * N * V * K)

"""One problem per kernel: tensors, the kernel's call, the same in plain torch, and the floor.

The floor counts the fewest bytes and operations that any kernel would need: each input read once, each output
written once, rows and products of equal ids once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embkern.ops import autoencoder_loss, cosine_mse_loss, gather_decode, gather_project, reference
from embkern.ops.reference import MEAN, NONE
from embkern.tables.packed import TENSORS, PackedTable

from ...packed_tables import random_packed_table
from .place import Call, Device

SCALE, PADDING = 0.7, 0
TWO_TERMS, ROOT_TERMS = (1.0, 1.0, 0.0, 0.0), (0.2, 0.5, 0.3, 0.0)
ALL_TERMS, ALPHA, EPS = (0.2, 0.5, 0.3, 0.4), 0.7, 1e-8
# Added to twice plain torch's error: a scalar may be exact by chance, and 1 - cos cancels.
TINY, TINY_LOSS = 1e-7, 1e-6
# Sums of fp16 squares lose bits that a Gram matrix in bf16's range does not: fp16 is never taken for one on a
# device, and only stands for bf16 in a rehearsal.
TINY_GRAM_FP16 = 1e-3


@dataclass(frozen=True)
class Shape:
    """Sizes of one case; those that a kernel does not have are 0."""

    N: int
    H: int
    r: int = 0
    V: int = 0

    def __str__(self) -> str:
        """Return the sizes as N x H, rank, rows."""
        return f"{self.N}x{self.H}" + (f" r={self.r}" if self.r else "") + (f" V={self.V}" if self.V else "")


@dataclass
class Problem:
    """One case's tensors. ``changing`` are the inputs that other values may be copied into."""

    call: Call
    plain: Callable[[torch.dtype], tuple[Tensor, ...]]
    changing: list[Tensor]
    least_bytes: float
    least_flops: float = 0.0
    tiny: float = TINY
    timed: Call | None = None  # in place of the call, where that makes a copy first

    def change(self, other: Problem) -> None:
        """Copy the inputs of another problem of the same shapes."""
        for mine, theirs in zip(self.changing, other.changing, strict=True):
            mine.copy_(theirs)


def _normal(generator: torch.Generator, *size: int) -> Tensor:
    return torch.randn(size, generator=generator, device=generator.device)


def _ids(generator: torch.Generator, N: int, V: int) -> Tensor:
    return (torch.rand(N, generator=generator, device=generator.device) ** 3 * V).long()  # many repeat


def _differentiated(function: Callable, tensors: list[Tensor], dtype: torch.dtype, upstream: Tensor) -> tuple:
    """Return a function's value and the gradients of its tensors, all in ``dtype``."""
    leaves = [each.detach().to(dtype).requires_grad_() for each in tensors]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))


def lookup(
    backend: Any, shape: Shape, dtype: torch.dtype, place: Device, generator: torch.Generator, *, what: str
) -> Problem:
    """gather_project: its forward, into given memory, its backward (dense, sparse), or both by autograd."""
    N, H, r, V = shape.N, shape.H, shape.r, shape.V
    ids, size = _ids(generator, N, V), dtype.itemsize
    floats = (_normal(generator, V, r), _normal(generator, r, H) / r**0.5, _normal(generator, H))
    codes, basis, offset = (each.to(dtype) for each in floats)
    upstream = _normal(generator, N, H).to(dtype)
    distinct = len(ids.unique())

    def plain(cast: torch.dtype) -> tuple[Tensor, ...]:
        def rows(codes: Tensor, basis: Tensor, offset: Tensor) -> Tensor:
            return SCALE * (F.embedding(ids, codes) @ basis + offset)

        if what in ("forward", "out"):
            return (rows(codes.to(cast), basis.to(cast), offset.to(cast)),)
        padded = upstream if what == "autograd" else upstream.masked_fill((ids == PADDING)[:, None], 0)
        value, *grads = _differentiated(rows, [codes, basis, offset], cast, padded)
        if what == "sparse backward":  # one row per position
            grads[0] = SCALE * padded.to(cast) @ basis.to(cast).t()
        return (value, *grads) if what == "autograd" else tuple(grads)

    def call() -> tuple[Tensor, ...]:
        if what == "forward":
            return (place.op("gather_project_forward", backend)(ids, codes, basis, offset, SCALE),)
        if what == "out":
            out = torch.empty_like(upstream)
            place.op("gather_project_out", backend)(ids, codes, basis, offset, SCALE, out)
            return (out,)
        if what == "autograd":
            function = functools.partial(gather_project, ids, scale=SCALE, backend=backend)
            return _differentiated(function, [codes, basis, offset], dtype, upstream)
        sparse = what == "sparse backward"
        backward = place.op("gather_project_backward", backend)
        needs = (True, True, True, sparse)
        code_ids, grad_codes, *rest = backward(upstream, ids, codes, basis, SCALE, PADDING, *needs)
        if sparse:  # a row per position; rows of wrong ids are zeroed without a synchronisation
            grad_codes = grad_codes * (code_ids == ids)[:, None]
        return grad_codes, *rest

    parameters, out = (distinct * r + r * H + H) * size, N * H * size
    gradients = out + ((V if what != "sparse backward" else N) * r + r * H + H) * size + parameters
    product = 2.0 * distinct * r * H
    least_bytes, least_flops = 8 * N + parameters + out, product
    if "backward" in what:
        least_bytes, least_flops = 8 * N + gradients, 2 * product
    elif what == "autograd":
        least_bytes, least_flops = 8 * N + parameters + out + gradients, 3 * product
    return Problem(call, plain, [ids, codes, basis, offset, upstream], least_bytes, least_flops)


@functools.lru_cache(maxsize=8)  # made on the CPU, which takes seconds
def _packed_table(V: int, H: int, K: int, dtype: torch.dtype, device: str) -> PackedTable:
    return random_packed_table(V, H, K, dtype).to(torch.device(device))


def packed(
    backend: Any, shape: Shape, dtype: torch.dtype, place: Device, generator: torch.Generator, *, what: str
) -> Problem:
    """gather_decode: its forward, or forward and backward by autograd."""
    N, H, K, V = shape.N, shape.H, shape.r, shape.V
    table = _packed_table(V, H, K, dtype, place.type)
    ids = _ids(generator, N, V)
    codes = [getattr(table, name) for name in TENSORS[:4]]
    floats = [getattr(table, name).clone() for name in TENSORS[4:]]
    floats[-1].copy_(_normal(generator, H))
    upstream = _normal(generator, N, H).to(dtype)

    def plain(cast: torch.dtype) -> tuple[Tensor, ...]:
        wide: list[Any] = [each.to(cast) for each in floats]
        rows = reference.gather_decode_forward(ids, *codes, *wide, H, SCALE)
        if what == "forward":
            return (rows,)
        tensors = (*codes, *wide[:2], SCALE, -1, True, True, True)
        return rows, *reference.gather_decode_backward(upstream.to(cast), ids, *tensors)

    def call() -> tuple[Tensor, ...]:
        if what == "forward":
            return (place.op("gather_decode_forward", backend)(ids, *codes, *floats, H, SCALE),)

        def rows(*factors: Tensor) -> Tensor:
            tensors: list[Any] = [ids, *codes, *factors]
            return gather_decode(*tensors, embedding_dim=H, scale=SCALE, backend=backend)

        return _differentiated(rows, floats, dtype, upstream)

    transform = codes[2][table.tier_of_rows().to(codes[2].device)[ids].long(), 0] != 0
    words = 4 * len(codes[0]) / V  # of a record, on average
    product = 2.0 * int(transform.sum()) * K * H
    out, parameters = N * H * dtype.itemsize, (K + 1) * H * dtype.itemsize
    least_bytes = 8 * N + len(ids.unique()) * words + parameters + out
    if what == "autograd":
        least_bytes, product = 2 * (least_bytes + parameters), 3 * product
    return Problem(call, plain, [ids, floats[-1], upstream], least_bytes, product)


TERM_NAMES = ("cosine_weight", "mse_weight", "rmse_weight", "power_weight")


def loss_of_rows(
    backend: Any,
    shape: Shape,
    dtype: torch.dtype,
    place: Device,
    generator: torch.Generator,
    *,
    terms: tuple[float, float, float, float],
    reduction: int = MEAN,
    everything: bool = False,
    autograd: bool = False,
) -> Problem:
    """cosine_mse: the loss and the gradient of output; or everything: row weights, norms, both gradients."""
    N, H = shape.N, shape.H
    accumulation = reference.accumulation_dtype(dtype)
    x = _normal(generator, N, H)
    target, output = x.to(dtype), (x + 0.5 * _normal(generator, N, H)).to(dtype)
    row_weight = target_norm = grad_loss = None
    if everything:
        row_weight = torch.rand(N, generator=generator, device=x.device, dtype=accumulation) + 0.1
        target_norm = target.to(accumulation).norm(dim=1)
        size = (N,) if reduction == NONE else ()
        grad_loss = torch.rand(size, generator=generator, device=x.device, dtype=accumulation) + 0.5
    if dtype == torch.float16 and grad_loss is None and reduction == MEAN:  # else the gradient vanishes
        grad_loss = torch.full((), 1024.0, device=x.device, dtype=accumulation)
    tensors = [output, target, row_weight, target_norm, grad_loss]
    options = (reduction, *terms, ALPHA, EPS, True, everything)

    def plain(cast: torch.dtype) -> tuple[Tensor, ...]:
        wide = reference.accumulation_dtype(cast)
        given: list[Any] = [
            each if each is None else each.to(cast if each.dim() == 2 else wide) for each in tensors
        ]
        forward: Callable = reference.cosine_mse_forward
        return forward(*given, *options)

    def call() -> tuple[Tensor, ...]:
        if not autograd:
            return tuple(place.op("cosine_mse_forward", backend)(*tensors, *options))
        leaf = output.detach().requires_grad_()
        weights: dict[str, Any] = dict(zip(TERM_NAMES, terms, strict=True))
        loss = cosine_mse_loss(leaf, target, alpha=ALPHA, eps=EPS, backend=backend, **weights)
        upstream = torch.ones_like(loss) if grad_loss is None else grad_loss
        return loss.detach(), *torch.autograd.grad(loss, leaf, upstream), output.new_empty(0)

    changing = [each for each in tensors if each is not None]
    return Problem(call, plain, changing, (3 + everything) * N * H * dtype.itemsize, tiny=TINY_LOSS)


def scaled_gradient(
    backend: Any, shape: Shape, dtype: torch.dtype, place: Device, generator: torch.Generator, *, by_row: bool
) -> Problem:
    """scale_gradient_: by one number, or by one per row, some of which are 1 and leave their row as it is."""
    grad = _normal(generator, shape.N, shape.H).to(dtype)
    factor = _normal(generator, shape.N if by_row else 1)
    factor = factor.masked_fill(factor < -1, 1) if by_row else factor[0].clone()
    scale, buffer = place.op("scale_gradient_", backend), grad.clone()
    one = torch.full_like(factor, -1)

    def plain(cast: torch.dtype) -> tuple[Tensor, ...]:
        wide = reference.accumulation_dtype(cast)
        return ((grad.to(wide) * factor.to(wide).reshape(-1, 1)).to(cast),)

    def call() -> tuple[Tensor, ...]:
        copy = grad.clone()
        scale(copy, factor)
        return (copy,)

    def timed() -> tuple[Tensor, ...]:
        scale(buffer, one)
        return (buffer,)

    return Problem(call, plain, [grad, factor], 2 * grad.nbytes, timed=timed)


def autoencoder(
    backend: Any,
    shape: Shape,
    dtype: torch.dtype,
    place: Device,
    generator: torch.Generator,
    *,
    by_gram: bool,
    autograd: bool = False,
) -> Problem:
    """autoencoder: terms and gradients with an encoder in r dimensions, or of a table's codes by rows."""
    N, H, r = shape.N, shape.H, shape.r
    accumulation = reference.accumulation_dtype(dtype)
    target = _normal(generator, N, H).to(dtype)
    encoder, basis = _normal(generator, r, H) / H**0.5, _normal(generator, r, H) / r**0.5
    bias, offset = 0.1 * _normal(generator, r), 0.3 * _normal(generator, H)
    model = (None, encoder, bias) if by_gram else (_normal(generator, N, r), None, None)
    parameters = [None if each is None else each.to(dtype) for each in (*model, basis, offset)]
    row_weight = torch.rand(N, generator=generator, device=target.device, dtype=accumulation) + 0.1
    values = [None, None] if autograd else [row_weight, target.to(accumulation).norm(dim=1)]
    terms = TWO_TERMS if by_gram else ALL_TERMS
    options = (MEAN, *terms, ALPHA, EPS, True)
    tensors = [target, *parameters, *values]

    def plain(cast: torch.dtype) -> tuple[Tensor, ...]:
        wide = reference.accumulation_dtype(cast)
        given = [each if each is None else each.to(cast) for each in tensors[:6]]
        rows = [each if each is None else each.to(wide) for each in values]
        return reference.autoencoder_forward(*given, *rows, *options)

    def call() -> tuple[Tensor, ...]:
        with place.form(by_gram):
            if not autograd:
                return tuple(place.op("autoencoder_forward", backend)(*tensors, *options))
            names = ("codes", "encoder_weight", "encoder_bias", "basis", "offset")
            leaves: dict[str, Any] = {
                name: each.detach().requires_grad_()
                for name, each in zip(names, parameters, strict=True)
                if each is not None
            }
            weights: dict[str, Any] = dict(zip(TERM_NAMES, terms, strict=True))
            loss = autoencoder_loss(target, **leaves, **weights, alpha=ALPHA, eps=EPS, backend=backend)
            grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
            return loss.detach(), *(grads.get(name, target.new_empty(0)) for name in names)

    size = sum(each.numel() for each in parameters if each is not None)
    # Codes, products with the basis, and the gradients of basis, encoder and codes.
    products = 5 if by_gram else 3
    changing = [each for each in tensors if each is not None]
    tiny = TINY_GRAM_FP16 if by_gram and dtype == torch.float16 else TINY_LOSS
    least_bytes = (N * H + 2 * size) * dtype.itemsize
    problem = Problem(call, plain, changing, least_bytes, 2.0 * products * N * H * r, tiny)
    if autograd:  # the first of four terms is the loss
        problem.plain = lambda cast: (plain(cast)[0][0], *plain(cast)[1:])
    return problem

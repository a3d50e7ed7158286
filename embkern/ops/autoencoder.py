"""autoencoder_loss: the loss of a linear decoder and its gradients, without the reconstruction.

For ``y = codes @ basis + offset`` every sum of the loss over H is a sum in r dimensions. A kernel that takes
a block of rows at a time never writes the (N, H) reconstruction or its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from . import reference
from .backends import Backend, select
from .cosine_mse import check_loss_options, check_row_values
from .library import apply, define, needs_autograd, overload, second_derivative_refused
from .scale_gradient import scaled_gradient


def _forward_fake(
    target: Tensor,
    codes: Tensor | None,
    encoder_weight: Tensor | None,
    encoder_bias: Tensor | None,
    basis: Tensor,
    offset: Tensor | None,
    row_weight: Tensor | None,
    target_norm: Tensor | None,
    reduction: int,
    cosine_weight: float,
    mse_weight: float,
    rmse_weight: float,
    power_weight: float,
    alpha: float,
    eps: float,
    needs_grad: bool,
) -> tuple[Tensor, ...]:
    parameters = (codes, encoder_weight, encoder_bias, basis, offset)
    grads = [
        torch.empty_like(each, memory_format=torch.contiguous_format)
        if needs_grad and each is not None
        else target.new_empty(0)
        for each in parameters
    ]
    return target.new_empty((4,), dtype=reference.accumulation_dtype(target.dtype)), *grads


define(
    "autoencoder_forward",
    "(Tensor target, Tensor? codes, Tensor? encoder_weight, Tensor? encoder_bias, Tensor basis, "
    "Tensor? offset, Tensor? row_weight, Tensor? target_norm, int reduction, float cosine_weight, "
    "float mse_weight, float rmse_weight, float power_weight, float alpha, float eps, bool needs_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    backends=("native", "triton"),
    fake=_forward_fake,
)


def _train_fake(rows: Tensor, order: Tensor, batch_size: int, *_: object) -> Tensor:
    return rows.new_empty(-(-order.shape[0] // batch_size))


# Takes steps of Adam in place, over batches of `order` (ids of rows; the last batch may be smaller), and
# returns the loss before each step. The vectors hold encoder weight (r, H), encoder bias (r,), basis (r, H)
# and offset (H,); `step` is the number of steps taken before.
define(
    "autoencoder_train",
    "(Tensor rows, Tensor order, int batch_size, Tensor(a!) parameters, Tensor(b!) first_moment, "
    "Tensor(c!) second_moment, int rank, int step, float lr, float beta1, float beta2, float adam_eps, "
    "float cosine_weight, float mse_weight, float rmse_weight, float power_weight, float alpha, float eps) "
    "-> Tensor",
    backends=("native",),
    fake=_train_fake,
)

_FORWARD: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "native": overload("autoencoder_forward", "native"),
    "triton": overload("autoencoder_forward", "triton"),
    "torch": reference.autoencoder_forward,
}


class AutoencoderLoss(Function):
    """Autograd of autoencoder_loss: the forward computes all gradients, the backward scales them."""

    @staticmethod
    def forward(
        codes: Tensor | None,
        encoder_weight: Tensor | None,
        encoder_bias: Tensor | None,
        basis: Tensor,
        offset: Tensor | None,
        target: Tensor,
        row_weight: Tensor | None,
        target_norm: Tensor | None,
        options: tuple[Any, ...],
        backend: str,
    ) -> tuple[Tensor, ...]:
        """Run the backend's forward on validated arguments and return the terms and the five gradients."""
        parameters = (codes, encoder_weight, encoder_bias, basis, offset)
        return _FORWARD[backend](target, *parameters, row_weight, target_norm, *options, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the gradients."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad_terms: Tensor | None, *second: Tensor | None) -> tuple[Any, ...]:
        """Return the gradients of the five parameters."""
        # A compiled graph passes a tangent for every output and refuses second derivatives itself.
        if not torch.compiler.is_compiling() and any(each is not None for each in second):
            raise second_derivative_refused()
        grads: list[Tensor | None] = [None] * 5
        if grad_terms is not None:
            needed = zip(ctx.saved_tensors, ctx.needs_input_grad[:5], strict=True)
            grads = [scaled_gradient(each, grad_terms[0]) if need else None for each, need in needed]
        return *grads, None, None, None, None, None


def autoencoder_loss(
    target: Tensor,
    basis: Tensor,
    offset: Tensor | None = None,
    *,
    codes: Tensor | None = None,
    encoder_weight: Tensor | None = None,
    encoder_bias: Tensor | None = None,
    cosine_weight: float = 1.0,
    mse_weight: float = 1.0,
    rmse_weight: float = 0.0,
    power_weight: float = 0.0,
    alpha: float = 1.0,
    row_weight: Tensor | None = None,
    target_norm: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    eps: float = 1e-8,
    backend: Backend | None = None,
) -> Tensor:
    """Compute the loss of a linear autoencoder or of a factorised table without writing the reconstruction.

    ``cosine_mse_loss(codes @ basis + offset, target, ...)``, and with an encoder
    ``codes = F.linear(target, encoder_weight, encoder_bias)``.

    With cosine and squared terms only, the sums over H are taken in r dimensions: with
    ``P = target @ basis.T`` and ``G = basis @ basis.T``, ``<x, y> = c.P``, ``|y|^2 = c G c``, and the
    gradient of a row is ``s y + t x`` with two numbers per row. ``|x - y|^2 = |x|^2 - 2 c.P + c G c`` cancels
    where the fit is good.

    On CUDA, a row whose squared error is below a hundredth of the terms that are subtracted is summed over H
    again, so that the loss is right at any fit. The gradients keep the Gram form; their relative error grows
    as the inverse of ``|x - y| / |x|``, as plain torch's does. It is at most that of the products with the
    table, ``sqrt(H) 2^-24 |t| |target| |basis|`` for codes and ``(sqrt(N) + 1) 2^-24 |t codes| |target|`` for
    the basis: 2 to 16 times plain torch's for a well-conditioned basis, depending on the order in which a
    processor adds, and no greater for an ill-conditioned one (embkern/triton/autoencoder/gram_form.py).

    On CPU, large batches take the Gram form block by block. A block is computed in the direct form, with y in
    cache, if one of its rows has norms near the ends of fp32; a squared error below 1/16 of the terms that
    are subtracted (``|x|^2`` and the larger of ``|y|^2`` and ``p = sum_j c_j^2 G_jj + |offset|^2``); or a
    ``|y|^2`` below p / 16, where codes cancel each other or the offset.

    Args:
        target: (N, H), the rows; without gradient.
        basis: (r, H), the decoder's weight.
        offset: (H,), the decoder's bias.
        codes: (N, r), the latents; given if and only if there is no encoder.
        encoder_weight: (r, H), weight of the encoder that computes the codes of ``target``.
        encoder_bias: (r,), its bias; only with ``encoder_weight``.
        cosine_weight: weight of the cosine distance. This and all arguments below are those of
            ``cosine_mse_loss``.
        mse_weight: weight of the mean squared error.
        rmse_weight: weight of its root. With the mean, its gradient costs another forward pass.
        power_weight: weight of the power term, which needs y: blocks of y are computed and dropped.
        alpha: exponent of the power term.
        row_weight: (N,), weights of the rows.
        target_norm: (N,), ``target.norm(dim=-1)`` where it is known.
        reduction: ``mean`` or ``sum``.
        eps: lower bound of the product of the two norms.
        backend: ``native``, ``triton`` or ``torch``; None takes the best for the device.

    Returns:
        A scalar, float32 (float64 for float64 input).

    Raises:
        TypeError: a dtype is not supported, or dtypes differ.
        ValueError: shapes or devices do not fit, not exactly one of codes and encoder_weight is given,
            target, row_weight or target_norm requires a gradient, or an option is out of range.
        RuntimeError: the requested backend cannot serve this call.

    Source: arXiv 2106.08181, section 3, for the model and the loss.
    """
    parameters = (codes, encoder_weight, encoder_bias, basis, offset)
    _check(target, parameters, row_weight, target_norm, reduction, alpha, eps)
    chosen = select("autoencoder", target.device.type, target.dtype, backend)
    weights = (float(cosine_weight), float(mse_weight), float(rmse_weight), float(power_weight))
    options = (reference.REDUCTIONS.index(reduction), *weights, float(alpha), float(eps))
    accumulation = reference.accumulation_dtype(target.dtype)
    row_values = [
        None if each is None else each.to(accumulation).contiguous() for each in (row_weight, target_norm)
    ]
    contiguous = [None if each is None else each.contiguous() for each in parameters]
    if needs_autograd(*parameters):
        loss: Tensor = apply(AutoencoderLoss, *contiguous, target.contiguous(), *row_values, options, chosen)[
            0
        ][0]
        return loss
    return _FORWARD[chosen](target.contiguous(), *contiguous, *row_values, *options, False)[0][0]


def autoencoder_forward(
    target: Tensor,
    parameters: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor | None],
    target_norm: Tensor | None,
    options: tuple[int, float, float, float, float, float, float],
    needs_grad: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    """Run the raw op of a backend, for trainers: the terms (4,) and the gradients of the five parameters."""
    return _FORWARD[backend](target, *parameters, None, target_norm, *options, needs_grad)


def _check(
    target: Tensor,
    parameters: tuple[Tensor | None, ...],
    row_weight: Tensor | None,
    target_norm: Tensor | None,
    reduction: str,
    alpha: float,
    eps: float,
) -> None:
    codes, encoder_weight, encoder_bias, basis, offset = parameters
    assert basis is not None
    if target.dim() != 2 or target.shape[1] == 0:
        raise ValueError(f"target: expected shape (N, H) with H >= 1, got {tuple(target.shape)}")
    if not target.is_floating_point():
        raise TypeError(f"target: expected a floating-point dtype, got {target.dtype}")
    if target.requires_grad:
        raise ValueError("target: expected a tensor without gradient, got one that requires it")
    N, H = target.shape
    if basis.dim() != 2 or basis.shape[1] != H:
        raise ValueError(f"basis: expected shape (r, {H}) as wide as target, got {tuple(basis.shape)}")
    r = basis.shape[0]
    if (codes is None) == (encoder_weight is None):
        raise ValueError(
            "codes, encoder_weight: expected exactly one of them, got "
            + ("none" if codes is None else "both")
        )
    if encoder_bias is not None and encoder_weight is None:
        raise ValueError("encoder_bias: expected None without encoder_weight, got a tensor")
    for name, tensor, shape in (
        ("codes", codes, (N, r)),
        ("encoder_weight", encoder_weight, (r, H)),
        ("encoder_bias", encoder_bias, (r,)),
        ("basis", basis, (r, H)),
        ("offset", offset, (H,)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != target.dtype:
            raise TypeError(f"{name}: expected dtype {target.dtype} as in target, got {tensor.dtype}")
        if tensor.device != target.device:
            raise ValueError(f"{name}: expected device {target.device} as in target, got {tensor.device}")
    check_row_values("row_weight", row_weight, target)
    check_row_values("target_norm", target_norm, target)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected mean or sum, got {reduction!r}")
    check_loss_options(reduction, alpha, eps, target.dtype)

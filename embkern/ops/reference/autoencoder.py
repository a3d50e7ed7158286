"""Definition of autoencoder_loss and its gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cosine_mse import cosine_mse_forward
from .numerics import autocast_off


@autocast_off
def autoencoder_forward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Terms (4,), and the gradients of codes, encoder_weight, encoder_bias, basis and offset.

    target (N, H); codes (N, r), or encoder_weight (r, H) and encoder_bias (r,) that compute them from target;
    basis (r, H), offset (H,). The terms are the loss, then cosine distance, MSE and power term without their
    weights, with the same reduction; the power term is 0 if its weight is. Gradients that do not exist are
    empty tensors.
    """
    encoded = codes is None
    if encoded:
        assert encoder_weight is not None
        codes = F.linear(target, encoder_weight, encoder_bias)
    assert codes is not None
    output = codes @ basis if offset is None else torch.addmm(offset, codes, basis)

    def loss(weights: tuple[float, float, float, float], needs: bool) -> tuple[Tensor, Tensor]:
        value, grad, _ = cosine_mse_forward(
            output, target, row_weight, target_norm, None, reduction, *weights, alpha, eps, needs, False
        )
        return value, grad

    total, grad = loss((cosine_weight, mse_weight, rmse_weight, power_weight), needs_grad)
    terms = [total, loss((1.0, 0.0, 0.0, 0.0), False)[0], loss((0.0, 1.0, 0.0, 0.0), False)[0]]
    terms.append(loss((0.0, 0.0, 0.0, 1.0), False)[0] if power_weight else torch.zeros_like(total))
    grads = [target.new_empty(0) for _ in range(5)]
    if needs_grad:
        grad_codes = grad @ basis.t()
        if encoded:
            grads[1] = grad_codes.t() @ target
            if encoder_bias is not None:
                grads[2] = grad_codes.sum(0)
        else:
            grads[0] = grad_codes
        grads[3] = codes.t() @ grad
        if offset is not None:
            grads[4] = grad.sum(0)
    return (torch.stack(terms), *grads)  # type: ignore[return-value]

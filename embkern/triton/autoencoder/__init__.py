"""autoencoder_loss: cuBLAS for the products over the table, Triton for what is between them.

There are two forms: `gram_form` takes every sum in r dimensions; `row_form` writes the reconstruction block
by block where it is needed, cheaper or safer.

Products of fp32 are never cut to TF32, whatever torch.backends.cuda.matmul says; 16-bit ones accumulate in
fp32. For a bf16 table, tensors in r dimensions are fp32; only the left factor of the second product and the
results are rounded to bf16. Sums over a row and over the rows run in fp64: the loss is right for norms of
1e-20 to 1e20, the gradients in the Gram form up to 1e15 (beyond that t is subnormal in fp32, and the gradient
of the offset loses digits). There are no atomics and no host synchronisation.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ...ops import reference
from . import gram_form, row_form
from .shared import Model, Options


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
    """Return the terms (4,) and the gradients of the five parameters, as reference.autoencoder_forward does.

    The terms are fp32 (fp64 for fp64); the gradients have the dtype of the parameters.
    """
    model = Model(codes, encoder_weight, encoder_bias, basis, offset)
    scalars = (cosine_weight, mse_weight, rmse_weight, power_weight, alpha, eps)
    if target.shape[0] == 0:
        return reference.autoencoder_forward(
            target, *model, row_weight, target_norm, reduction, *scalars, needs_grad
        )
    options = Options(reduction, *scalars)
    by_gram = power_weight == 0 and gram_form.gram_pays(target, basis.shape[0])
    forward = gram_form.loss_by_gram if by_gram else row_form.loss_by_rows
    off = torch.autocast(target.device.type, enabled=False)
    with torch.cuda.device_of(target), torch.no_grad(), off, _full_precision():
        return forward(target, model, row_weight, target_norm, options, needs_grad)


_precision_lock = threading.RLock()


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply fp32 in full precision on CUDA. The setting is global: one thread at a time changes it."""
    settings = torch.backends.cuda.matmul
    with _precision_lock:
        before = settings.fp32_precision
        if before == "ieee":
            yield
            return
        settings.fp32_precision = "ieee"
        try:
            yield
        finally:
            settings.fp32_precision = before

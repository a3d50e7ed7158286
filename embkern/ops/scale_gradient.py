"""scale_gradient_: a gradient that the forward computed, times the gradient that arrives in the backward."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .backends import unavailable
from .library import define, overload


def _fake(grad: Tensor, grad_loss: Tensor) -> None:
    return None


# grad *= grad_loss, a scalar or one value per row. Where it is 1, the kernel does not read the gradient.
define(
    "scale_gradient_",
    "(Tensor(a!) grad, Tensor grad_loss) -> ()",
    backends=("native", "triton"),
    fake=_fake,
)

# Whether the graph that is being differentiated will be needed again (retain_graph, create_graph).
_keeps_graph: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)


def scaled_gradient(grad: Tensor, grad_loss: Tensor) -> Tensor:
    """Return ``grad * grad_loss`` for a gradient that the forward computed for an incoming gradient of 1.

    grad (N, ...), grad_loss a scalar or (N,). Unless the graph is kept, nothing else refers to ``grad``: it
    is scaled in place, and not touched at all if grad_loss is 1. On CUDA the kernel tests that, so that the
    host does not wait.
    """
    factor = grad_loss.reshape(-1, *(1,) * (grad.dim() - 1)) if grad_loss.dim() else grad_loss
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or _keeps_graph():
        return (grad * factor).to(grad.dtype)
    if grad.is_cpu:
        ones = grad_loss.item() == 1 if grad_loss.dim() == 0 else bool((grad_loss == 1).all())
        return grad if ones else grad.mul_(factor)
    scale = _cuda_kernel() if grad.is_cuda else None
    if scale is None:
        return grad.mul_(factor)
    scale(grad, grad_loss.contiguous())
    return grad


@functools.cache
def _cuda_kernel() -> Callable[[Tensor, Tensor], None] | None:
    """Return the kernel of the first backend whose loss can be used, which comes with it."""
    for backend in ("native", "triton"):
        if unavailable(backend, "cosine_mse", "cuda", torch.float32) is None:
            kernel: Callable[[Tensor, Tensor], None] = overload("scale_gradient_", backend)
            return kernel
    return None

"""scale_gradient_: a gradient that the forward computed, times the gradient that arrives in the backward."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from .library import define, overload


def _fake(grad: Tensor, grad_loss: Tensor) -> None:
    return None


# grad *= grad_loss, a scalar or one value per row. Where it is 1, the kernel does not read the gradient.
define("scale_gradient_", "(Tensor(a!) grad, Tensor grad_loss) -> ()", backends=("triton",), fake=_fake)

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
    if grad.is_cuda and importlib.util.find_spec("triton") is not None:
        overload("scale_gradient_", "triton")(grad, grad_loss.contiguous())
        return grad
    return grad.mul_(factor)

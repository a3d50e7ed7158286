"""Record a forward pass: the rows that it looked up, as leaves of autograd, and the inputs of the head."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..find_table import ModelTable
from ..inference import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Recording:
    """What the modules of a table did in a forward pass.

    Attributes:
        lookups: ids, output and scale of each lookup; the output is a leaf that requires gradients.
        heads: input and output of each call of the output head.
    """

    lookups: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)
    heads: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def clear(self) -> None:
        self.lookups.clear()
        self.heads.clear()


@contextlib.contextmanager
def recorded(model: PreTrainedModel, table: ModelTable, head: nn.Module | None) -> Iterator[Recording]:
    """Record the forward passes of the block, with gradients of nothing but the looked-up rows.

    Dropout and the cache of keys and values are off in the block. Afterwards the model is as it was.
    """
    found = Recording()

    def keep_lookup(scale: float) -> Callable[..., Tensor]:
        def hook(_: Any, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            rows = output.detach().requires_grad_()
            found.lookups.append((arguments[0], rows, scale))
            return rows

        return hook

    def keep_head(_: Any, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        found.heads.append((arguments[0].detach(), output))

    embeddings = {id(module): (module, name) for name, module in _modules(model, table)}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with contextlib.ExitStack() as stack:
        for module, name in embeddings.values():  # once each: T5 has one module under several names
            handle = module.register_forward_hook(keep_lookup(table.scales.get(name, 1.0)))
            stack.callback(handle.remove)
        if head is not None:
            stack.callback(head.register_forward_hook(keep_head).remove)
        stack.enter_context(evaluating(model))
        for parameter, flag in flags:  # otherwise autograd would keep what their gradients need
            stack.callback(parameter.requires_grad_, flag)
            parameter.requires_grad_(False)
        stack.enter_context(torch.enable_grad())
        yield found


def _modules(model: PreTrainedModel, table: ModelTable) -> list[tuple[str, nn.Module]]:
    return [(name, model.get_submodule(name)) for name in table.embeddings]

"""Another embedding table for a dense model, for as long as a ``with`` block."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, get_args

from torch import Tensor, nn

from ..nn import layer_of
from ..tables import Table
from .find_table import ModelTable, find_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Decodable(Protocol):
    """A table that can be decoded, such as one in a format that embkern has no layer for."""

    def to_dense(self) -> Tensor:
        """Return the table (V, H)."""


class TableSwap:
    """Another table for a dense model, which uses it inside a ``with`` block.

    ``with swap.inputs():`` replaces the table of the input embedding, ``with swap.inputs_and_heads():`` that
    of a tied head as well. Afterwards the model has the modules it had before. A compressed table is used by
    the layers that ``embkern.compress`` installs; any other table is decoded.

    Attributes:
        heads: replacements of the tied heads, by name; empty if there is none, or if a head cannot use the
            table (an activation after its product).

    Args:
        model: a dense model.
        table: a table of the same shape as the model's.
        found: the place of the model's table; looked up if not given.

    Raises:
        ValueError: the table has another shape, or the model's cannot be replaced.
    """

    def __init__(
        self, model: PreTrainedModel, table: Table | Tensor | Decodable, found: ModelTable | None = None
    ) -> None:
        found = found or find_table(model)
        dense = {name: model.get_submodule(name) for name in [*found.embeddings, *found.heads]}
        self.model = model
        self.embeddings: dict[str, nn.Module] = {}
        self.heads: dict[str, nn.Module] = {}
        if isinstance(table, get_args(Table)):
            _check_shape((table.num_embeddings, table.embedding_dim), found)
            live = table.to(device=found.weight.device, dtype=found.weight.dtype)
            for name in found.embeddings:
                layer = layer_of(live).from_table(
                    live, padding_idx=dense[name].padding_idx, scale=found.scales[name]
                )
                self.embeddings[name] = layer.eval()
            if getattr(table, "activation", None) is None:
                root: Any = self.embeddings[found.root]
                self.heads = {name: root.head(dense[name].bias).eval() for name in found.heads}
        else:
            rows = table if isinstance(table, Tensor) else table.to_dense()
            _check_shape(tuple(rows.shape), found)
            weight = nn.Parameter(rows.detach().to(found.weight), requires_grad=False)
            self.embeddings = {name: _with_weight(dense[name], weight) for name in found.embeddings}
            self.heads = {name: _with_weight(dense[name], weight) for name in found.heads}

    def inputs(self) -> contextlib.AbstractContextManager[None]:
        """Use the table in the input embedding."""
        return _replaced(self.model, self.embeddings)

    def inputs_and_heads(self) -> contextlib.AbstractContextManager[None]:
        """Use the table in the input embedding and in tied heads."""
        return _replaced(self.model, {**self.embeddings, **self.heads})


def _check_shape(shape: tuple[int, ...], found: ModelTable) -> None:
    if shape != tuple(found.weight.shape):
        raise ValueError(f"tables: expected the model's {tuple(found.weight.shape)}, got {shape}")


def _with_weight(module: nn.Module, weight: nn.Parameter) -> nn.Module:
    """Return a copy of an embedding or a head that shares everything but its weight."""
    clone = copy.copy(module)
    clone._parameters = {**module._parameters, "weight": weight}
    return clone


@contextlib.contextmanager
def _replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    before = {name: model.get_submodule(name) for name in modules}
    for name, module in modules.items():
        model.set_submodule(name, module)
    try:
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)

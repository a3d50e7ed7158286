"""``Adjustment``: the trainable change of a compressed table, relative to what is stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Adjustment(nn.Module):
    """Trains the floating-point tensors of a table: ``stored + unit * change``, where changes begin at zero.

    The stored tensors of a table are small numbers that act on many values at once: an optimizer's step of
    1e-5 doubles a scale of 1e-5, and with it a whole row. A change is in the units of a row's entries, so
    that a learning rate does to a row what it does to a dense one, or less. With SGD, a change of one row
    moves it by the projection of a dense step; with Adam, a change that rows share moves their entries by at
    most the learning rate, on average over the rows. Weight decay pulls rows to what is stored.

    Changes are of fp32 even where the table is of 16 bits, so that small steps add up.

    Args:
        stored: floating-point tensors by name.
        units: for each, what a change of 1 means: a tensor that is broadcast to its shape.
    """

    def __init__(self, stored: dict[str, Tensor], units: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in stored.items():
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            self.register_parameter(name, nn.Parameter(torch.zeros_like(tensor, dtype=dtype)))
            self.register_buffer(_unit(name), units[name].to(tensor.device, dtype))

    def adjusted(self, name: str, stored: Tensor) -> Tensor:
        """Return the stored tensor plus its change, in the dtype of the change."""
        change: Tensor = getattr(self, name)
        unit: Tensor = getattr(self, _unit(name))
        return stored.detach().to(change.dtype) + unit * change

    def share(self, name: str, other: Adjustment) -> None:
        """Train the change of a tensor that another table holds, too, together with that of the other."""
        self.register_parameter(name, getattr(other, name))
        self.register_buffer(_unit(name), getattr(other, _unit(name)))

    @torch.no_grad()
    def reset(self) -> None:
        """Set all changes to zero."""
        for change in self.parameters():
            change.zero_()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(prefix + name in state_dict for name in self._parameters):
            super()._load_from_state_dict(state_dict, prefix, *args)
        # Else the file has a table alone, whose module resets this one, or another module that shares it.


def inverse(sizes: Tensor) -> Tensor:
    """Return ``1 / sizes``, and 0 where a size is 0: what has no size is not trained."""
    return torch.where(sizes > 0, 1 / sizes, 0.0)


def _unit(name: str) -> str:
    return f"unit_of_{name}"

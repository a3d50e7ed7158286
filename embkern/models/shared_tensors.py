"""Tensors that several compressed tables of a model share: the central core of tensor trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..nn.table_module import ADJUSTMENT
from .config import TableState
from .swap import table_modules, table_roots

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def link(model: PreTrainedModel, states: Mapping[str, TableState]) -> None:
    """Let the modules of tables hold the parameters that they share with another table, and tie them.

    Raises:
        ValueError: the model lacks the table that stores one of them.
    """
    roots = table_roots(model)
    paths = {id(module): path for path, module in model.named_modules()}
    for name, state in states.items():
        for tensor, owner in state.shares.items():
            if name not in roots:
                continue
            if owner not in roots:
                raise ValueError(
                    f"quantization_config: the table {name!r} shares {tensor} with {owner!r}, "
                    "which the model does not have"
                )
            followers = [each for each in table_modules(model) if each.table_name == name]
            for module in followers:
                module.register_parameter(tensor, getattr(roots[owner], tensor))
            source = f"{paths[id(roots[owner])]}.{tensor}"
            _tie(model, [f"{paths[id(module)]}.{tensor}" for module in followers], source)


def _tie(model: PreTrainedModel, targets: list[str], source: str) -> None:
    """Tie parameters of a model to another one, in it and in nested models that hold both."""
    for prefix, module in model.named_modules():
        if not hasattr(module, "all_tied_weights_keys"):
            continue
        inside = f"{prefix}." if prefix else ""
        own = {
            target.removeprefix(inside): source.removeprefix(inside)
            for target in targets
            if target.startswith(inside) and source.startswith(inside)
        }
        module._tied_weights_keys = {**(getattr(module, "_tied_weights_keys", None) or {}), **own}
        module.all_tied_weights_keys = {**module.all_tied_weights_keys, **own}


def of_owners(
    saved: dict[str, dict[str, Tensor]], states: Mapping[str, TableState]
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of tables to save, of which those that are shared are one tensor."""
    return {
        name: {**tensors, **{tensor: saved[owner][tensor] for tensor, owner in states[name].shares.items()}}
        for name, tensors in saved.items()
    }


def without_shared_changes(state_dict: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Return a state dict without the changes of shared tensors, except those of their owners."""
    seen, dropped = set[int](), set[str]()
    for path, module in model.named_modules():
        if module in table_roots(model).values() and (adjustment := module._modules.get(ADJUSTMENT)):
            for name, change in adjustment._parameters.items():
                if id(change) in seen:
                    dropped |= {f"{path}.{ADJUSTMENT}.{name}", f"{path}.{ADJUSTMENT}.unit_of_{name}"}
                seen.add(id(change))
    return {key: value for key, value in state_dict.items() if key not in dropped}

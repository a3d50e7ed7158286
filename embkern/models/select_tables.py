"""Select embedding tables of a model, and its output head, by name or pattern."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn

from ..nn.table_module import TableModule
from .find_table import (
    ModelTable,
    Role,
    UnsupportedModelError,
    check_model,
    input_or_none,
    output_or_none,
    table_at,
)
from .swap import canonical_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Names of the input embedding and of the output head in any model.
ALIASES: dict[str, Role] = {"input": "input", "output": "head"}


def find_tables(
    model: PreTrainedModel, wanted: Mapping[str, float | None]
) -> list[tuple[ModelTable, float | None]]:
    """Find the tables that names or patterns select, each with its ratio.

    A pattern is compared with the names of the embedding modules and of the output head, from any dot on:
    ``wpe`` and ``transformer.w*`` select ``transformer.wpe``. ``input`` stands for the input embedding and
    ``output`` for the output head. A module stands for all that share its weight.

    Args:
        model: the model.
        wanted: ratios or None by pattern; of several patterns for one table, the last one decides.

    Returns:
        The tables in the order of the model, that of the input first, and what ``wanted`` has for them.

    Raises:
        UnsupportedModelError: as ``find_table``; a selected module cannot be replaced, or a pattern selects
            no module.
    """
    check_model(model)
    names = dict(model.named_modules(remove_duplicate=False))
    if any(isinstance(each, TableModule) for each in names.values()):
        raise UnsupportedModelError(
            "the model is compressed already; decode it first (model.dequantize(), embkern export) and name "
            "all tables in one call"
        )
    candidates = _candidates(model, names)
    ratios: dict[str, float | None] = {}
    for pattern, ratio in wanted.items():
        matching = [name for name, role in candidates.items() if matches(pattern, name, role)]
        if not matching:
            shown = ", ".join(f"{name} ({_size(names[name])})" for name in candidates) or "none"
            raise UnsupportedModelError(
                f"tables: expected names or patterns of embeddings or of the output head, got {pattern!r}, "
                f"which selects none of {shown}"
            )
        ratios.update(dict.fromkeys(matching, ratio))
    found: dict[int, tuple[ModelTable, float | None]] = {}
    for name in sorted(candidates, key=lambda each: candidates[each] != "input"):
        if name not in ratios:
            continue
        weight: Any = names[name].weight
        known = found.get(id(weight))
        table = known[0] if known else table_at(model, name)
        found[id(weight)] = table, ratios[name]
    return list(found.values())


def _candidates(model: PreTrainedModel, names: Mapping[str, nn.Module]) -> dict[str, Role]:
    """Return the modules that can be compressed, by name: all embeddings and a linear output head."""
    own, head = input_or_none(model), output_or_none(model)
    return {
        name: "input" if module is own else "head" if module is head else "other"
        for name, module in names.items()
        if isinstance(module, nn.Embedding) or (module is head and isinstance(module, nn.Linear))
    }


def matches(pattern: str, name: str, role: Role) -> bool:
    """Return whether a pattern or alias selects the module of a name and role."""
    if pattern in ALIASES:
        return role == ALIASES[pattern]
    return fnmatchcase(f".{name}", f"*.{pattern}")


def _size(module: Any) -> str:
    return " x ".join(map(str, module.weight.shape))


def table_named(model: PreTrainedModel, name: str, shape: tuple[int, int]) -> ModelTable | None:
    """Return the table of the module that a saved model calls ``name``, or None if there is none.

    Architectures nest their parts under different prefixes, so that the name may begin at any dot.

    Args:
        model: the model, which may be on the meta device.
        name: canonical name of the module in the model that was saved.
        shape: (V, H) of the table, by which modules of the same name are told apart.
    """
    names: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    matching = []
    for path, module in names.items():
        own = f".{canonical_name(model, path)}"
        if isinstance(module, (nn.Embedding, nn.Linear)) and (
            f".{name}".endswith(own) or own.endswith(f".{name}")
        ):
            matching.append(path)
    matching.sort(key=lambda each: (tuple(names[each].weight.shape) == shape, len(each)))
    return table_at(model, matching[-1]) if matching else None

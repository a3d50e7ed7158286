"""Train the compressed tables of a model: relative to what is stored, or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..nn.adjustment import Adjustment
from ..nn.base import CompressedHead
from .find_table import Role
from .select_tables import matches
from .swap import tables_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel


def unfreeze_table(
    model: PreTrainedModel | SentenceTransformer, table: str | None = None
) -> dict[str, Adjustment]:
    """Make the compressed tables of a model, or some of them, trainable in place; by default they are frozen.

    The new parameters are changes of the stored tensors in units in which a learning rate suits them as it
    suits a dense table: of a packed table the length of each row, the basis and the offset; of factors codes,
    basis and offset. They are zero at first, and of fp32 in a model of 16 bits. Make the optimizer after this
    call.

    The codes of a packed table stay fixed. ``save_pretrained`` saves each table with the changes, rounded to
    the dtype in which it is stored, and leaves the model as it is.

    Args:
        model: a model compressed by embkern.
        table: name or pattern of the tables, as ``embkern.compress`` takes them (``"input"``, ``"lm_head"``,
            ``"*.wpe"``); None selects all that are compressed.

    Returns:
        The modules of the new parameters by the name of each table's first module. The modules that share a
        table, such as an embedding and a tied head, share one: ``scales`` or ``codes``, ``basis`` and
        ``offset``. They can be frozen one by one.

    Raises:
        ValueError: the model is not compressed by embkern, ``table`` selects none of its tables, or a table
            is offloaded.
    """
    selected = _selected(model, table)
    for name, modules in selected.items():
        if any(tensor.is_meta for tensor in modules[0].tensors().values()):
            raise ValueError(
                f"model: its table {name} is offloaded; load it without a device_map to train it"
            )
    found = {name: unfreeze(modules) for name, modules in selected.items()}
    owners: dict[int, Adjustment] = {}
    for name, modules in selected.items():
        for tensor, stored in _continuous(modules).items():
            if (owner := owners.setdefault(id(stored), found[name])) is not found[name]:
                found[name].share(tensor, owner)
    return found


def freeze_table(model: PreTrainedModel | SentenceTransformer, table: str | None = None) -> None:
    """Add what was trained to the compressed tables of a model, in place, and freeze them again.

    Args:
        model: a model compressed by embkern.
        table: name or pattern of the tables, as ``unfreeze_table`` takes them; None selects all.

    Raises:
        ValueError: the model is not compressed by embkern, or ``table`` selects none of its tables.
    """
    for modules in _selected(model, table).values():
        freeze(modules)


def unfreeze(modules: list[Any]) -> Adjustment:
    """Make the table of modules that share it trainable; the first leads."""
    adjustment: Adjustment = modules[0].unfreeze()
    for module in modules:
        module.adjust(adjustment)
    return adjustment.requires_grad_(True)


def freeze(modules: list[Any]) -> None:
    """Add what was trained to the table of modules that share it, and freeze it; the first leads."""
    modules[0].fold()
    for module in modules:
        module.adjust(None)


def _selected(model: Any, table: str | None) -> dict[str, list[Any]]:
    """Return the modules of the compressed tables that a name or pattern selects, by name."""
    tables = tables_of(model)
    if not tables:
        raise ValueError("model: expected one compressed by embkern, got a dense one")
    if table is None:
        return tables
    names = {id(module): name for name, module in model.named_modules()}
    selected = {
        name: modules
        for name, modules in tables.items()
        if any(matches(table, names[id(module)], _role(module)) for module in modules)
    }
    chosen = {id(each) for modules in selected.values() for each in _continuous(modules).values()}
    for name, modules in tables.items():
        if name not in selected and any(id(each) in chosen for each in _continuous(modules).values()):
            raise ValueError(
                f"table: expected all tables that share a central core, or None, got {table!r} without {name}"
            )
    if not selected:
        raise ValueError(
            "table: expected the name or a pattern of a compressed table, "
            f"got {table!r}, which selects none of {', '.join(tables)}"
        )
    return selected


def _continuous(modules: list[Any]) -> dict[str, Any]:
    """Return the floating-point tensors of a table that modules share."""
    return {name: each for name, each in modules[0]._stored().items() if each.is_floating_point()}


def _role(module: Any) -> Role:
    if isinstance(module, CompressedHead):
        return "head"
    return "other" if module.table_name else "input"

"""``KINDS``: the kinds of compressed tables, by the names that saved models have for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..tables import ROW_TABLES, RowTable, Table
from .base import CompressedEmbedding
from .factorized import FactorizedEmbedding
from .packed import PackedEmbedding
from .rows import TableEmbedding


class Kind(NamedTuple):
    """A kind of compressed table.

    Attributes:
        name: its name in a saved model's config.
        table_type: class of the table.
        layer: class of the embedding over it.
        tensor_names: names of the tensors that a table has or may have.
        code_names: names of those that are integers.
    """

    name: str
    table_type: Any
    layer: type[CompressedEmbedding]
    tensor_names: tuple[str, ...]
    code_names: tuple[str, ...]

    def code_dtype(self, name: str, shape: tuple[int, ...]) -> torch.dtype | None:
        """Return the dtype of an integer tensor of a table and of files; None for the others."""
        if issubclass(self.table_type, RowTable):
            found: torch.dtype | None = self.table_type.code_dtypes.get(name)
            return found
        return self.layer.code_dtype(name, shape)

    def held_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which a module holds a tensor that a table has in this one."""
        return self.layer.held_dtype(name, dtype)

    def settings(self, table: Any) -> dict[str, Any]:
        """Return the fields of a table of this kind that are not tensors, as JSON values."""
        found: dict[str, Any] = (
            table.settings() if isinstance(table, RowTable) else self.layer.settings(table)
        )
        return found


KINDS: dict[str, Kind] = {
    layer.kind: Kind(layer.kind, layer.table_type, layer, layer.tensor_names, layer.code_names)
    for layer in (FactorizedEmbedding, PackedEmbedding)
}
KINDS |= {
    each.kind: Kind(each.kind, each, TableEmbedding, each.tensor_names(), tuple(each.code_dtypes))
    for each in ROW_TABLES
}


def kind_of(table: Table) -> Kind:
    """Return the kind of a table."""
    return next(kind for kind in KINDS.values() if isinstance(table, kind.table_type))


def layer_of(table: Table) -> type[CompressedEmbedding]:
    """Return the embedding class for the type of ``table``."""
    return kind_of(table).layer

"""Compressed tables, in memory and in a file: ``Factors``, ``PackedTable`` and the kinds of ``RowTable``."""

from .factors import Factors
from .nonlinear import NonlinearTable
from .packed import PackedTable
from .product import ProductTable
from .pruned import PrunedPackedTable, PrunedTable
from .rows import RowTable
from .scalar import ScalarTable
from .tensor_train import TensorTrainTable

Table = Factors | PackedTable | RowTable
ROW_TABLES: tuple[type[RowTable], ...] = (
    NonlinearTable,
    ProductTable,
    PrunedPackedTable,
    PrunedTable,
    ScalarTable,
    TensorTrainTable,
)

__all__ = [
    "ROW_TABLES",
    "Factors",
    "NonlinearTable",
    "PackedTable",
    "ProductTable",
    "PrunedPackedTable",
    "PrunedTable",
    "RowTable",
    "ScalarTable",
    "Table",
    "TensorTrainTable",
]

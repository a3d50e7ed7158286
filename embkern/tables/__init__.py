"""Compressed tables: ``Factors`` and ``PackedTable``, in memory and in a file."""

from .factors import Factors
from .packed import PackedTable

Table = Factors | PackedTable

__all__ = ["Factors", "PackedTable", "Table"]

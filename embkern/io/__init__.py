"""Files: atomic writes, checksummed JSON and tensors, memory-mapped tables, the cache directory."""

from .mapped_table import TableFile
from .tensor_format import TensorFormat

__all__ = ["TableFile", "TensorFormat"]

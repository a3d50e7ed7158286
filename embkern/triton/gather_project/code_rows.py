"""How the kernels read rows of codes, which may lie any number of elements apart."""
# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of a jit function.)

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

_VECTOR_BYTES = 16


class CodeRows(NamedTuple):
    """Elements from one row to the next, columns that are loaded of a row, and whether both are vectors."""

    stride: int
    loaded: int
    aligned: bool


def code_rows(codes: Tensor) -> CodeRows:
    """Return how rows of codes (V, r) are read.

    Rows of, say, 75 columns that start on 16 bytes are loaded 80 at a time, if the memory has them: loads
    that end at 75 would be of single elements. What lies between the rows does not reach a result.
    """
    (V, r), stride, itemsize = codes.shape, codes.stride(0), codes.itemsize
    if (stride * itemsize) % _VECTOR_BYTES or codes.data_ptr() % _VECTOR_BYTES:
        return CodeRows(stride, r, False)
    vector = _VECTOR_BYTES // itemsize
    loaded = -(-r // vector) * vector
    if loaded != r:
        end = codes.storage_offset() + (V - 1) * stride + loaded
        if loaded > stride or end * itemsize > codes.untyped_storage().nbytes():
            return CodeRows(stride, r, False)
    return CodeRows(stride, loaded, True)


@triton.jit
def load_codes(rows, k, gathered, r: tl.constexpr, LOADED: tl.constexpr):
    """Columns ``k`` of rows, zero from r on and where not ``gathered``."""
    codes = tl.load(rows + k[None, :], mask=gathered & (k < LOADED)[None, :], other=0.0)
    if r != LOADED:
        codes = tl.where((k < r)[None, :], codes, 0.0)  # what lies between the rows may be NaN
    return codes

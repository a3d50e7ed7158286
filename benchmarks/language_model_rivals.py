"""What `language_models` compares with beyond the methods of embkern: GGUF's formats, and errors fed forward.

The formats are quantised and decoded by their own libraries: the `gguf` package in numpy, and llama.cpp's
ggml by ctypes, where a package that contains it is installed. The K-quants (Q4_K, Q6_K) have blocks of 256
values, so that a table whose rows are no multiple of 256 has no such format.
"""

from __future__ import annotations

import ctypes
import functools
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embkern.methods.quantizer_levels import lloyd_max_levels
from embkern.methods.scalar import SCALES
from embkern.tables.bit_codes import packed_bytes

from .reconstruction import Reconstruction

GGML_PACKAGES = ("pywhispercpp", "llama-cpp-python")  # wheels with llama.cpp's library of tensors
NUMPY_FORMATS = ("Q8_0", "Q5_0", "Q4_0")  # those that the gguf package can quantise to, below 9 bits
GGML_FORMATS = ("Q6_K", "Q4_K", "IQ4_NL")

# Of feed_forward: rows that stay in cache, and columns whose errors are fed beyond them in one product. Torch
# uses one thread for 1024 x 32 values, so that its many small operations wait for no other thread.
BLOCK_ROWS, BLOCK_COLUMNS = 1024, 32


def gguf_format(table: Tensor, name: str) -> Reconstruction:
    """Return a table (V, H) fp32 in a format of GGUF.

    Raises:
        ImportError: the package that can quantise to the format is not installed.
        ValueError: the format has no rows of H values.
    """
    import gguf

    kind = gguf.GGMLQuantizationType[name]
    values, size = gguf.GGML_QUANT_SIZES[kind]
    V, H = table.shape
    if H % values:
        raise ValueError(f"{name} has blocks of {values} values, which rows of {H} do not fill")
    rows = table.contiguous().numpy()
    packed = gguf.quantize(rows, kind) if name in NUMPY_FORMATS else _by_ggml(rows, kind, H // values * size)
    decoded = torch.from_numpy(gguf.dequantize(packed, kind).astype(np.float32, copy=False))
    return Reconstruction(decoded.view(V, H), {"blocks": packed.nbytes}, {"format": name})


def _by_ggml(rows: np.ndarray, kind: Any, row_bytes: int) -> np.ndarray:
    packed = np.empty((len(rows), row_bytes), np.uint8)
    library = ggml_library()
    library.ggml_quantize_init(int(kind))
    written = library.ggml_quantize_chunk(
        int(kind), ctypes.c_void_p(rows.ctypes.data), ctypes.c_void_p(packed.ctypes.data), ctypes.c_int64(0),
        ctypes.c_int64(len(rows)), ctypes.c_int64(rows.shape[1]), None,
    )  # fmt: skip
    assert written == packed.nbytes, f"ggml wrote {written} bytes, expected {packed.nbytes}"
    return packed


@functools.cache
def ggml_library() -> Any:
    """Return ggml's shared library of an installed package.

    Raises:
        ImportError: there is none.
    """
    for package in GGML_PACKAGES:
        try:
            files = metadata.files(package) or []
        except metadata.PackageNotFoundError:
            continue
        for file in sorted(files, key=str):
            if "libggml-base" in file.name and ".so" in file.name:
                library = ctypes.CDLL(str(Path(str(file.locate())).resolve()))
                library.ggml_quantize_chunk.restype = ctypes.c_size_t
                return library
    raise ImportError(f"ggml: none of {', '.join(GGML_PACKAGES)} is installed")


@torch.no_grad()
def feed_forward(table: Tensor, bits: int, moment: Tensor) -> Reconstruction:
    """Quantise all rows at one rate, and feed the error of each column forward to those not yet quantised.

    Minimises ``(e * (e @ moment)).sum()`` over the errors ``e = x - y`` greedily, column by column in the
    order of falling diagonal. The codes are Lloyd-Max levels of a normal distribution with an fp16 scale per
    row.

    Args:
        table: (V, H) fp32.
        bits: of a code.
        moment: (H, H), the second moment of the hidden states that a tied head multiplies rows with.

    Source: Frantar et al., GPTQ (arXiv 2210.17323); equal to LDLQ of Chee et al. (arXiv 2307.13304).
    """
    V, H = table.shape
    damped = moment.double() + 0.01 * moment.diagonal().mean() * torch.eye(H, dtype=torch.float64)
    order = damped.diagonal().argsort(descending=True)
    inverse = torch.linalg.inv(damped[order][:, order])
    factor = torch.linalg.cholesky(inverse, upper=True)
    forward = (factor / factor.diagonal()[:, None]).float()
    levels = lloyd_max_levels(bits).float()
    edges = (levels[1:] + levels[:-1]) / 2
    decoded = torch.empty(V, H)
    for start in range(0, V, BLOCK_ROWS):
        rows = table[start : start + BLOCK_ROWS]
        scale = _best_scale(rows, levels, edges)
        left = rows[:, order].t().contiguous()
        for first in range(0, H, BLOCK_COLUMNS):
            last = min(first + BLOCK_COLUMNS, H)
            errors = torch.empty(last - first, len(rows))
            for column in range(first, last):
                value = levels[torch.bucketize(left[column] / scale, edges)] * scale
                errors[column - first] = value - left[column]
                left[column] = value
                left[column + 1 : last].addr_(forward[column, column + 1 : last], errors[column - first])
            left[last:].addmm_(forward[first:last, last:].t(), errors)
        decoded[start : start + BLOCK_ROWS, order] = left.t()
    parts = {"codes": packed_bytes(V * H, bits), "scales": 2 * V}
    return Reconstruction(decoded, parts, {"bits": bits})


def _best_scale(rows: Tensor, levels: Tensor, edges: Tensor) -> Tensor:
    """Return the scale of each row (N,) with the least squared error, of those that `lloyd_max` tries."""
    spread = rows.square().mean(1, keepdim=True).sqrt().clamp_min(1e-8)
    best, least = spread, torch.full_like(spread, torch.inf)
    for factor in SCALES:
        scale = (factor * spread).half().float()
        error = (levels[torch.bucketize(rows / scale, edges)] * scale - rows).square().sum(1, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best[:, 0]

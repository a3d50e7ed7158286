"""Every op in plain torch: the definition, the oracle of the tests, and the backend of last resort.

The forwards are the formulas of the public docstrings; the tests check every kernel against them in float64.
The gradients that the kernels compute are written out and checked by numerical differentiation. Sums run in
fp32 for narrower dtypes (float64 for float64).
"""

from .autoencoder import autoencoder_forward
from .cosine_mse import MEAN, NONE, POWER_BIAS, REDUCTIONS, SUM, cosine_mse_forward
from .gather_decode import gather_decode_backward, gather_decode_forward, gather_decode_in_aten
from .gather_project import gather_project_backward, gather_project_forward
from .low_rank_cross_entropy import (
    low_rank_cross_entropy_backward,
    low_rank_cross_entropy_forward,
    low_rank_gradients,
)
from .numerics import accumulation_dtype, sums_dtype
from .packed_cross_entropy import packed_cross_entropy_backward, packed_cross_entropy_forward
from .packed_logits import packed_logits_backward, packed_logits_forward, packed_logits_in_aten
from .quantize_rows import quantize_rows
from .quantize_trellis import quantize_trellis

__all__ = [
    "MEAN",
    "NONE",
    "POWER_BIAS",
    "REDUCTIONS",
    "SUM",
    "accumulation_dtype",
    "autoencoder_forward",
    "cosine_mse_forward",
    "gather_decode_backward",
    "gather_decode_forward",
    "gather_decode_in_aten",
    "gather_project_backward",
    "gather_project_forward",
    "low_rank_cross_entropy_backward",
    "low_rank_cross_entropy_forward",
    "low_rank_gradients",
    "packed_cross_entropy_backward",
    "packed_cross_entropy_forward",
    "packed_logits_backward",
    "packed_logits_forward",
    "packed_logits_in_aten",
    "quantize_rows",
    "quantize_trellis",
    "sums_dtype",
]

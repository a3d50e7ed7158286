"""Methods map a table (V, H) and a size to a ``PackedTable`` or ``Factors``; ``METHODS`` lists them."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from .allocate import AllocateOptions, allocate
from .autoencoder import AutoencoderOptions, autoencoder
from .base import Options, rank_for_ratio
from .calibration import Calibration
from .direction import DirectionOptions, direction
from .metric_allocation import predicted_divergence
from .norm_repair import repair_norms
from .svd import SVDOptions, svd


class Method(NamedTuple):
    """A method as the recipe and the command line use it.

    Attributes:
        compress: called as ``compress(table, rank, **options)``, or ``compress(table, ratio=ratio,
            **options)`` where ``sized_by`` is ``"ratio"``.
        options: the model of the options.
        has_offset: whether factors made with these options have an offset, on which the rank for a ratio
            depends.
        sized_by: whether the method takes a rank or a ratio of bytes.
        weighted: whether it also takes ``counts``, (V,) float64: how often each token is read.
        calibrated: whether it also takes a ``calibration``, and whether the table is ``tied``.
    """

    compress: Callable[..., Any]
    options: type[Options]
    has_offset: Callable[[Any], bool] = lambda options: False
    sized_by: Literal["rank", "ratio"] = "rank"
    weighted: bool = False
    calibrated: bool = False


METHODS: dict[str, Method] = {
    "allocate": Method(allocate, AllocateOptions, sized_by="ratio", weighted=True, calibrated=True),
    "autoencoder": Method(autoencoder, AutoencoderOptions, lambda options: True),
    "direction": Method(direction, DirectionOptions, lambda options: options.center, weighted=True),
    "svd": Method(svd, SVDOptions, lambda options: options.center),
}

__all__ = [
    "METHODS",
    "AllocateOptions",
    "AutoencoderOptions",
    "Calibration",
    "DirectionOptions",
    "Method",
    "SVDOptions",
    "allocate",
    "autoencoder",
    "direction",
    "predicted_divergence",
    "rank_for_ratio",
    "repair_norms",
    "svd",
]

"""Methods: a table (V, H) and a size in, a ``PackedTable`` or ``Factors`` out; ``METHODS`` lists them."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from .allocate import AllocateOptions, allocate
from .autoencoder import AutoencoderOptions, autoencoder
from .base import Options, rank_for_ratio
from .direction import DirectionOptions, direction, repair_norms
from .svd import SVDOptions, svd


class Method(NamedTuple):
    """A method as the recipe and the command line see it.

    ``compress(table, rank, **options)``, or ``compress(table, ratio=ratio, **options)`` where the size is a
    ratio of bytes. A weighted one takes ``counts`` too: how often each token is read, (V,) float64.
    """

    compress: Callable[..., Any]
    options: type[Options]
    has_offset: Callable[[Any], bool] = lambda options: False  # the rank for a ratio depends on it
    sized_by: Literal["rank", "ratio"] = "rank"
    weighted: bool = False


METHODS: dict[str, Method] = {
    "allocate": Method(allocate, AllocateOptions, sized_by="ratio", weighted=True),
    "autoencoder": Method(autoencoder, AutoencoderOptions, lambda options: True),
    "direction": Method(direction, DirectionOptions, lambda options: options.center, weighted=True),
    "svd": Method(svd, SVDOptions, lambda options: options.center),
}

__all__ = [
    "METHODS",
    "AllocateOptions",
    "AutoencoderOptions",
    "DirectionOptions",
    "Method",
    "SVDOptions",
    "allocate",
    "autoencoder",
    "direction",
    "rank_for_ratio",
    "repair_norms",
    "svd",
]

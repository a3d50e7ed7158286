"""Methods: a table (V, H) and a rank in, Factors out. One file each; ``METHODS`` lists them by name."""

from collections.abc import Callable
from typing import NamedTuple

from ..factors import Factors
from .autoencoder import AutoencoderOptions, autoencoder
from .base import Options, rank_for_ratio
from .svd import SVDOptions, svd


class Method(NamedTuple):
    """A method as the recipe and the command line see it."""

    compress: Callable[..., Factors]
    options: type[Options]
    has_offset: Callable[[Options], bool]  # known before compressing: the rank for a ratio depends on it


METHODS: dict[str, Method] = {
    "autoencoder": Method(autoencoder, AutoencoderOptions, lambda options: True),
    "svd": Method(svd, SVDOptions, lambda options: getattr(options, "center", False)),
}

__all__ = ["METHODS", "Method", "autoencoder", "rank_for_ratio", "svd"]

"""Methods: a table (V, H) and a size in, what replaces it out. One file each; ``METHODS`` lists them."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from .allocate import AllocateOptions, allocate
from .autoencoder import AutoencoderOptions, autoencoder
from .base import Options, rank_for_ratio
from .direction import DirectionOptions, direction, repair_norms
from .nonlinear import NonlinearAutoencoderOptions, nonlinear_autoencoder
from .product import ProductQuantizationOptions, product_quantization
from .quantized import LloydMaxOptions, RTNOptions, lloyd_max, rtn
from .svd import SVDOptions, svd
from .tensor_train import TensorTrainOptions, tensor_train
from .vocabulary import VocabularyPruningOptions, vocabulary_pruning


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
    installable: bool = True  # False: a neighbour to compare with, no model can hold its result


_neighbour = functools.partial(Method, sized_by="ratio", installable=False)

METHODS: dict[str, Method] = {
    "allocate": Method(allocate, AllocateOptions, sized_by="ratio", weighted=True),
    "autoencoder": Method(autoencoder, AutoencoderOptions, lambda options: True),
    "direction": Method(direction, DirectionOptions, lambda options: options.center, weighted=True),
    "svd": Method(svd, SVDOptions, lambda options: options.center),
    "lloyd_max": _neighbour(lloyd_max, LloydMaxOptions),
    "nonlinear_autoencoder": _neighbour(nonlinear_autoencoder, NonlinearAutoencoderOptions, weighted=True),
    "product_quantization": _neighbour(product_quantization, ProductQuantizationOptions, weighted=True),
    "rtn": _neighbour(rtn, RTNOptions),
    "tensor_train": _neighbour(tensor_train, TensorTrainOptions),
    "vocabulary_pruning": _neighbour(vocabulary_pruning, VocabularyPruningOptions, weighted=True),
}

__all__ = [
    "METHODS",
    "Method",
    "allocate",
    "autoencoder",
    "direction",
    "rank_for_ratio",
    "repair_norms",
    "svd",
]

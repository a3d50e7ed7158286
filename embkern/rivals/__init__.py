"""Methods for comparison: a rival returns a decoded table and its size in bytes, which no model can hold."""

import functools
from collections import ChainMap
from collections.abc import Mapping
from typing import ClassVar

from ..methods import METHODS, Method
from ..recipe import Recipe
from .nonlinear import NonlinearAutoencoderOptions, nonlinear_autoencoder
from .product import ProductQuantizationOptions, product_quantization
from .pruning import VocabularyPruningOptions, vocabulary_pruning
from .reconstruction import Reconstruction
from .rtn import LloydMaxOptions, RTNOptions, lloyd_max, rtn
from .tensor_train import TensorTrainOptions, tensor_train

_rival = functools.partial(Method, sized_by="ratio")

RIVALS: dict[str, Method] = {
    "lloyd_max": _rival(lloyd_max, LloydMaxOptions),
    "nonlinear_autoencoder": _rival(nonlinear_autoencoder, NonlinearAutoencoderOptions, weighted=True),
    "product_quantization": _rival(product_quantization, ProductQuantizationOptions, weighted=True),
    "rtn": _rival(rtn, RTNOptions),
    "tensor_train": _rival(tensor_train, TensorTrainOptions),
    "vocabulary_pruning": _rival(vocabulary_pruning, VocabularyPruningOptions, weighted=True),
}
ALL_METHODS: Mapping[str, Method] = ChainMap(METHODS, RIVALS)


class ComparisonRecipe(Recipe):
    """A recipe whose method may also be a rival."""

    known_methods: ClassVar[Mapping[str, Method]] = ALL_METHODS


__all__ = [
    "ALL_METHODS",
    "RIVALS",
    "ComparisonRecipe",
    "Reconstruction",
    "lloyd_max",
    "nonlinear_autoencoder",
    "product_quantization",
    "rtn",
    "tensor_train",
    "vocabulary_pruning",
]

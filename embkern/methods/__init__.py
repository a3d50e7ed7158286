"""Methods map a table (V, H) and a size to a compressed table; ``METHODS`` lists them."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from .allocate import AllocateOptions, allocate
from .autoencoder import AutoencoderOptions, autoencoder
from .base import Options, rank_for_ratio
from .calibration import Calibration
from .direction import DirectionOptions, direction
from .metric_allocation import predicted_divergence
from .nonlinear import NonlinearAutoencoderOptions, nonlinear_autoencoder
from .norm_repair import repair_norms
from .product import ProductQuantizationOptions, product_quantization
from .pruning import PruneOptions, prune
from .scalar import LloydMaxOptions, RTNOptions, lloyd_max, rtn
from .shared_core import joint_bytes, shared_tensor_trains
from .svd import SVDOptions, svd
from .tensor_train import TensorTrainOptions, tensor_train
from .weighted_svd import FWSVDOptions, TFWSVDOptions, fwsvd, row_fisher, tfwsvd


class Method(NamedTuple):
    """A method as the recipe and the command line use it.

    Attributes:
        compress: called as ``compress(table, rank, **options)``, or ``compress(table, ratio=ratio,
            **options)`` where ``sized_by`` is ``"ratio"``.
        options: the model of the options.
        has_offset: whether factors made with these options have an offset, on which the rank for a ratio
            depends.
        sized_by: whether the method takes a rank or a ratio of bytes.
        packed: whether it makes packed tables.
        sizes_itself: whether it also works without a size.
        observed: whether it also takes ``read``, (V,) bool: which tokens a text has.
        weighted: whether it also takes ``counts``, (V,) float64: how often each token is read.
        calibrated: whether it also takes a ``calibration``, and whether the table is ``tied``.
        distributed: whether it also takes the ``world`` of a distributed run.
        of_fisher: the arguments that follow from the options and Fisher weights (V, H); None of methods that
            take none.
    """

    compress: Callable[..., Any]
    options: type[Options]
    has_offset: Callable[[Any], bool] = lambda options: False
    sized_by: Literal["rank", "ratio"] = "rank"
    packed: bool = False
    sizes_itself: bool = False
    observed: bool = False
    weighted: bool = False
    calibrated: bool = False
    distributed: bool = False
    of_fisher: Callable[[Any, Tensor], dict[str, Any]] | None = None


def _entries(options: Any, fisher: Tensor) -> dict[str, Any]:
    return {"fisher": fisher}


def _rows_if_asked(options: Any, fisher: Tensor) -> dict[str, Any]:
    """Return the square roots of the Fisher information of the rows, as the authors weigh them."""
    return {"row_weight": row_fisher(fisher).sqrt()} if options.weights == "fisher" else {}


METHODS: dict[str, Method] = {
    "allocate": Method(
        allocate,
        AllocateOptions,
        sized_by="ratio",
        packed=True,
        observed=True,
        weighted=True,
        calibrated=True,
        distributed=True,
    ),
    "autoencoder": Method(autoencoder, AutoencoderOptions, lambda options: True, distributed=True),
    "direction": Method(
        direction, DirectionOptions, lambda options: options.center, weighted=True, distributed=True
    ),
    "fwsvd": Method(fwsvd, FWSVDOptions, of_fisher=_entries),
    "lloyd_max": Method(lloyd_max, LloydMaxOptions, sized_by="ratio"),
    "nonlinear_autoencoder": Method(
        nonlinear_autoencoder,
        NonlinearAutoencoderOptions,
        sized_by="ratio",
        weighted=True,
        of_fisher=_rows_if_asked,
    ),
    "product_quantization": Method(
        product_quantization, ProductQuantizationOptions, sized_by="ratio", weighted=True
    ),
    "prune": Method(prune, PruneOptions, sized_by="ratio", sizes_itself=True, observed=True, weighted=True),
    "rtn": Method(rtn, RTNOptions, sized_by="ratio"),
    "svd": Method(svd, SVDOptions, lambda options: options.center),
    "tensor_train": Method(tensor_train, TensorTrainOptions, sized_by="ratio"),
    "tfwsvd": Method(tfwsvd, TFWSVDOptions, of_fisher=_entries),
}

__all__ = [
    "METHODS",
    "AllocateOptions",
    "AutoencoderOptions",
    "Calibration",
    "DirectionOptions",
    "FWSVDOptions",
    "LloydMaxOptions",
    "Method",
    "NonlinearAutoencoderOptions",
    "ProductQuantizationOptions",
    "PruneOptions",
    "RTNOptions",
    "SVDOptions",
    "TFWSVDOptions",
    "TensorTrainOptions",
    "allocate",
    "autoencoder",
    "direction",
    "fwsvd",
    "joint_bytes",
    "lloyd_max",
    "nonlinear_autoencoder",
    "predicted_divergence",
    "product_quantization",
    "prune",
    "rank_for_ratio",
    "repair_norms",
    "rtn",
    "shared_tensor_trains",
    "svd",
    "tensor_train",
    "tfwsvd",
]

"""Train the compressed table of a model: relative to what is stored, or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..nn.adjustment import Adjustment
from .swap import compressed_embedding, modules_of_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def unfreeze_table(model: PreTrainedModel) -> Adjustment:
    """Make the compressed table of a model trainable, in place; by default it is frozen.

    The new parameters are changes of the stored tensors in units in which a learning rate suits them as it
    suits a dense table: of a packed table the length of each row, the basis and the offset; of factors codes,
    basis and offset. They are zero at first, and of fp32 in a model of 16 bits. Make the optimizer after this
    call.

    The codes of a packed table stay fixed. ``save_pretrained`` saves the table with the changes, rounded to
    the dtype in which it is stored, and leaves the model as it is.

    Args:
        model: a model compressed by embkern.

    Returns:
        The module of the new parameters, which the embedding and a tied head share: ``scales`` or ``codes``,
        ``basis`` and ``offset``. They can be frozen one by one.

    Raises:
        ValueError: the model is not compressed by embkern, or its table is offloaded.
    """
    root = compressed_embedding(model)
    if any(tensor.is_meta for tensor in root.tensors().values()):
        raise ValueError("model: its table is offloaded; load it without a device_map to train it")
    adjustment = root.unfreeze()
    for module in modules_of_table(model):
        module.adjust(adjustment)
    adjustment.requires_grad_(True)
    return adjustment


def freeze_table(model: PreTrainedModel) -> None:
    """Add what was trained to the compressed table of a model, in place, and freeze it again.

    Args:
        model: a model compressed by embkern.

    Raises:
        ValueError: the model is not compressed by embkern.
    """
    compressed_embedding(model).fold()
    for module in modules_of_table(model):
        module.adjust(None)

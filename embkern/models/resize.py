"""Change the vocabulary size of a compressed model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..nn.base import CompressedEmbedding
from ..tables.resizing import resized
from .swap import compressed_embedding, modules_of_table
from .training import freeze_table, unfreeze_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def resize_token_embeddings(model: PreTrainedModel, num_embeddings: int) -> CompressedEmbedding:
    """Change the vocabulary size of a compressed model in place, as ``model.resize_token_embeddings`` does.

    New tokens decode to the mean row: exactly in factors, and in a packed table to the nearest row that it
    can represent. ``unfreeze_table`` makes them trainable as all other rows: of factors freely, of a packed
    table, whose codes stay fixed, in their length and, through basis and offset, all rows together. A table
    that is being trained continues to be, with new parameters: make the optimizer after this call. New
    entries of a head's bias are zero.

    Args:
        model: a model compressed by embkern.
        num_embeddings: V, at least 1.

    Returns:
        The model's input embedding.

    Raises:
        ValueError: ``num_embeddings`` is not a positive integer, or the model is not compressed by embkern.
    """
    root = compressed_embedding(model)
    trained = root.adjustment is not None
    if type(num_embeddings) is not int or num_embeddings < 1:
        raise ValueError(f"num_embeddings: expected a positive integer, got {num_embeddings!r}")
    if trained:
        freeze_table(model)
    added = max(0, num_embeddings - root.num_embeddings)
    before = {name: getattr(root, name) for name in root.tensors()}
    with torch.no_grad():
        table = resized(root.table, num_embeddings)
        root.replace(table)
    for module in modules_of_table(model):
        for name, old in before.items():
            if getattr(module, name) is old:
                setattr(module, name, getattr(root, name))
        if isinstance(module, CompressedEmbedding):
            module.num_embeddings = num_embeddings
            if module.padding_idx is not None and module.padding_idx >= num_embeddings:
                module.padding_idx = None
        else:
            module.out_features = num_embeddings
            if module.bias is not None:
                bias = nn.functional.pad(module.bias.detach()[:num_embeddings], (0, added))
                _replace_parameter(
                    model, module.bias, nn.Parameter(bias, requires_grad=module.bias.requires_grad)
                )
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):  # a dense head, which transformers can resize
        model.set_output_embeddings(model._get_resized_lm_head(head, num_embeddings))
    if hasattr(model, "_resize_final_logits_bias"):
        model._resize_final_logits_bias(num_embeddings)
    model.config.get_text_config().vocab_size = num_embeddings
    if hasattr(model, "vocab_size"):
        model.vocab_size = num_embeddings
    shapes = {name: list(tensor.shape) for name, tensor in table.tensors().items()}
    model.hf_quantizer.quantization_config.table.shapes = shapes
    for dense in model.hf_quantizer.original.modules.values():  # dequantize puts these modules back
        size = "num_embeddings" if isinstance(dense, nn.Embedding) else "out_features"
        setattr(dense, size, num_embeddings)
    if trained:
        unfreeze_table(model)
    return root


def _replace_parameter(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Replace a parameter in every module that holds it."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is old:
                setattr(module, name, new)

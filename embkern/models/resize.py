"""Change the vocabulary size of a compressed model."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..nn import kind_of
from ..nn.base import CompressedEmbedding, CompressedHead
from ..tables.resizing import resized
from .swap import compressed_embedding, table_modules, table_roots
from .training import freeze, unfreeze

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def resize_token_embeddings(
    model: PreTrainedModel, num_embeddings: int | None, *, pad_to_multiple_of: int | None = None
) -> CompressedEmbedding:
    """Change the vocabulary size of a compressed model in place, as ``model.resize_token_embeddings`` does.

    New tokens decode to the mean row: exactly in factors, and in a packed table to the nearest row that it
    can represent. In other tables they are copies of the row whose direction is nearest to the mean's; a
    tensor train holds no more rows. ``unfreeze_table`` makes them trainable as all other rows: of factors
    freely, of a packed table, whose codes stay fixed, in their length and, through basis and offset, all rows
    together. A table that is being trained continues to be, with new parameters: make the optimizer after
    this call. New entries of a head's bias are zero.

    Args:
        model: a model compressed by embkern.
        num_embeddings: V, at least 1; None is the present one.
        pad_to_multiple_of: V is rounded up to a multiple of this number.

    Returns:
        The model's input embedding.

    Raises:
        ValueError: an argument is not a positive integer, the model's input table is not compressed by
            embkern, or its representation holds no more rows.
    """
    roots = table_roots(model)
    if roots and "" not in roots:
        raise ValueError(
            f"model: expected a compressed input table, got a dense one beside {', '.join(roots)}; "
            "dequantize the model, resize it, and compress it again"
        )
    root = compressed_embedding(model)
    num_embeddings = _positive("num_embeddings", root.shape[0] if num_embeddings is None else num_embeddings)
    if pad_to_multiple_of is not None:
        multiple = _positive("pad_to_multiple_of", pad_to_multiple_of)
        num_embeddings = -(-num_embeddings // multiple) * multiple
    output = model.get_output_embeddings()
    names = {"", output.table_name} if isinstance(output, CompressedHead) else {""}
    for name in names:
        _resize_table(model, name, num_embeddings)
    if isinstance(output, nn.Linear):  # a dense head, which transformers can resize
        model.set_output_embeddings(model._get_resized_lm_head(output, num_embeddings))
    if hasattr(model, "_resize_final_logits_bias"):
        model._resize_final_logits_bias(num_embeddings)
    model.config.get_text_config().vocab_size = num_embeddings
    if hasattr(model, "vocab_size"):
        model.vocab_size = num_embeddings
    return root


def _positive(name: str, value: Any) -> int:
    """Return an integer of any type, such as NumPy's, that is at least 1."""
    try:
        found = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = 0
    if found < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    return found


def _resize_table(model: PreTrainedModel, name: str, num_embeddings: int) -> None:
    """Change the number of rows of the table ``name``, and of the modules over it."""
    root, quantizer = table_roots(model)[name], model.hf_quantizer
    modules = [each for each in table_modules(model) if each.table_name == name]
    if (trained := root.adjustment) is not None:
        freeze(modules)
    added = max(0, num_embeddings - root.shape[0])
    before = {tensor: getattr(root, tensor) for tensor in root.tensors()}
    with torch.no_grad():
        table = resized(root.table, num_embeddings)
        root.replace(table)
    for module in modules:
        for tensor, old in before.items():
            if getattr(module, tensor) is old:
                setattr(module, tensor, getattr(root, tensor))
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
    state = quantizer.quantization_config.states[name]
    state.shapes = {tensor: list(each.shape) for tensor, each in table.tensors().items()}
    state.settings = kind_of(table).settings(table)
    for original in quantizer.originals:
        if original.table.root == next(path for path, each in model.named_modules() if each is root):
            for dense in original.modules.values():  # dequantize puts these modules back
                size = "num_embeddings" if isinstance(dense, nn.Embedding) else "out_features"
                setattr(dense, size, num_embeddings)
    if trained is not None:
        for tensor, change in unfreeze(modules).named_parameters():
            change.requires_grad_(trained.get_parameter(tensor).requires_grad)


def _replace_parameter(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Replace a parameter in every module that holds it."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is old:
                setattr(module, name, new)

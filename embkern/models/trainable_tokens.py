"""PEFT's trainable tokens on compressed tables: some rows are dense and trained, in place of those stored."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.base import CompressedEmbedding


def with_trained_rows(layer: Any, inputs: Tensor, adapters: list[str]) -> Tensor:
    """Return the output of a ``TrainableTokensLayer`` of PEFT over a compressed embedding or head.

    ``F.embedding(ids, weight) * scale`` or ``F.linear(hidden, weight, bias)`` with ``weight[indices] = rows``
    for the token indices and trained rows of each adapter; the table is not decoded as a whole.

    Args:
        layer: the layer.
        inputs: ids (``*``) of an embedding, hidden states (``*``, H) of a head.
        adapters: names of the active adapters, whose indices differ.
    """
    table = layer.get_base_layer()
    output: Tensor = table(inputs)
    for name in adapters:
        rows, indices = layer.trainable_tokens_delta[name], layer.token_indices[name]
        ids = torch.tensor(indices, device=inputs.device)
        if isinstance(table, CompressedEmbedding):
            same = inputs.unsqueeze(-1) == ids
            padding = indices.index(table.padding_idx) if table.padding_idx in indices else None
            own = F.embedding(same.int().argmax(-1), rows, padding) * torch.tensor(table.scale).to(rows)
            output = torch.where(same.any(-1, keepdim=True), own.to(output.dtype), output)
        else:
            bias = None if table.bias is None else table.bias[ids].to(inputs.dtype)
            own = F.linear(inputs, rows.to(inputs.dtype), bias)
            output = output.index_copy(-1, ids, own.to(output.dtype))
    return output


def refuse_copy(module: Any) -> None:
    """Raise the ValueError of ``modules_to_save``, which trains and saves a copy of a module."""
    raise ValueError(
        f"modules_to_save: expected no compressed table, got {type(module).__name__}, of which PEFT would "
        "train a copy that has parted from its tied head. Train rows of some tokens with "
        "trainable_token_indices, thin matrices beside the table with embkern.enable_lora(config), or the "
        "table itself with embkern.unfreeze_table(model)"
    )

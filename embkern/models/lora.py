"""LoRA of PEFT on compressed embeddings and heads."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.base import CompressedEmbedding, CompressedHead

if TYPE_CHECKING:
    from peft import LoraConfig


def enable_lora(config: LoraConfig) -> LoraConfig:
    """Let a ``LoraConfig`` of PEFT target compressed embeddings and heads, in place.

    ``F.embedding(ids, weight + scaling * (B @ A).T) * scale`` for embeddings, ``F.linear(hidden, weight +
    scaling * B @ A)`` for heads, with the decoded table as ``weight``; A and B are trained, the table is not.
    Without this call PEFT says that the target module is not supported. To load an adapter::

        config = embkern.enable_lora(LoraConfig.from_pretrained(adapter))
        model = PeftModel.from_pretrained(compressed, adapter, config=config)

    An adapter stays beside the compressed table: merging it raises RuntimeError, as rows of a compressed
    table cannot be written; ``model.unload()`` removes it. DoRA and initialisations from the weights read the
    decoded table.

    Args:
        config: the config, with targets such as ``["q_proj", "embed_tokens", "lm_head"]``.

    Returns:
        The same config.

    Source: Hu et al. 2021, arXiv 2106.09685.
    """
    embedding, head = _layers()
    config._register_custom_module({CompressedEmbedding: embedding, CompressedHead: head})
    return config


@functools.cache
def _layers() -> tuple[type[nn.Module], type[nn.Module]]:
    """Return PEFT's layers for embeddings and linear modules, which know the sizes of compressed ones."""
    from peft.tuners.lora import Embedding, Linear

    class LoraCompressedEmbedding(Embedding):
        def _get_in_out_features(self, module: Any) -> tuple[int, int]:
            return module.num_embeddings, module.embedding_dim

        def _get_embed_scale(self) -> Tensor | None:
            scale = self.get_base_layer().scale
            return None if scale == 1 else torch.tensor(scale)

        def _embed(self, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
            return F.embedding(input, weight, padding_idx=self.get_base_layer().padding_idx)

    class LoraCompressedHead(Linear):
        def _get_in_out_features(self, module: Any) -> tuple[int, int]:
            return module.in_features, module.out_features

    return LoraCompressedEmbedding, LoraCompressedHead

"""``enable_ngrammer``: an N-Grammer at the input embedding of a causal model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..methods.product import product_codes
from ..nn import NGrammer, SegmentedEmbedding
from ..nn.base import CompressedEmbedding
from ..nn.ngrammer import Combine
from .find_table import UnsupportedModelError, check_model, input_embeddings, input_or_none
from .ngrammer_hooks import NAME, hook, unhook
from .quantizer import describe_ngrammer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BLOCK = 1 << 14  # rows that are looked up at a time
_KMEANS = 10  # iterations


@torch.no_grad()
def enable_ngrammer(
    model: PreTrainedModel,
    *,
    heads: int = 8,
    bits: int = 8,
    buckets: int = 16384,
    width: int | None = None,
    combine: Combine = "add",
    decay: float | None = 0.999,
    seed: int = 0,
) -> NGrammer:
    """Let an ``NGrammer`` add to the input embedding of a causal model, dense or compressed, in place.

    The latent ids are product-quantisation codes of the embedding's present rows. A hook on the embedding
    calls the layer, which is a submodule of it, and whose parameters are trained with the model.

    With a cache, the embedding sees the last tokens only. ``generate`` passes all ids as ``preceding_ids``;
    in a loop of your own, ``model(ids[:, -1:], past_key_values=cache, preceding_ids=ids)`` does. Positions
    that an ``attention_mask`` (B, length) leaves out precede no token.

    Args:
        model: the model.
        heads: number of sub-vectors of a row, a divisor of H.
        bits: 4 to 8, of a latent id.
        buckets: n-gram embeddings per head.
        width: columns of an n-gram embedding; None takes H / heads for ``add``, a quarter of it for
            ``concat``.
        combine: ``add`` leaves a trained model as it is until it is trained; ``concat`` is the form of the
            paper, which replaces columns of the rows, for models that are trained from scratch.
        decay: share of the codewords that remains in each step of training; None keeps the latent ids.
        seed: of k-means, hashes and n-gram embeddings.

    Returns:
        The layer.

    Raises:
        UnsupportedModelError: the model is an encoder-decoder, wrapped, on the meta device, has an N-Grammer
            already, or its embedding is none that can be extended.
        ValueError: a size is wrong.
        ImportError: faiss is not installed.
    """
    check_model(model)
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"model: expected a causal one, got {type(model).__name__}")
    embedding: Any = input_embeddings(model)
    if getattr(embedding, NAME, None) is not None:
        raise UnsupportedModelError(
            "model: its embedding has an N-Grammer already; disable_ngrammer removes it"
        )
    known = isinstance(embedding, (nn.Embedding, CompressedEmbedding))
    if not known or isinstance(embedding, SegmentedEmbedding):
        raise UnsupportedModelError(
            f"model: expected an nn.Embedding or a compressed one as input, got {type(embedding).__name__}"
        )
    if any(tensor.is_meta for tensor in (*embedding.parameters(), *embedding.buffers())):
        raise UnsupportedModelError("model: expected its embedding's values, got the meta device")
    device = next(embedding.parameters()).device
    ids = torch.arange(embedding.num_embeddings, device=device)
    rows = torch.cat([embedding(some).float() for some in ids.split(_BLOCK)])
    layer = NGrammer(
        *rows.shape, heads=heads, bits=bits, buckets=buckets, width=width, combine=combine, decay=decay
    )
    codes = product_codes(rows.cpu(), subspaces=heads, bits=bits, iterations=_KMEANS, seed=seed)
    layer.initialize(codes, scale=float(rows.square().mean().sqrt()), seed=seed)
    hook(model, layer.to(device).train(embedding.training))
    describe_ngrammer(model, layer.description())
    return layer


def disable_ngrammer(model: PreTrainedModel) -> None:
    """Remove the N-Grammer of a model, in place; what it learned is lost.

    Raises:
        ValueError: the model has none.
    """
    embedding: Any = input_or_none(model)
    if getattr(embedding, NAME, None) is None:
        raise ValueError("model: expected one with an N-Grammer, got one without")
    unhook(model)
    describe_ngrammer(model, None)

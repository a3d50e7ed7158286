"""How a model is run: what kind of language model it is, how much it reads at once, and evaluation mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def language_kind(model: PreTrainedModel) -> Literal["masked", "causal"] | None:
    """Return whether a model's class is that of a masked or a causal language model, or None for others."""
    from transformers.models.auto import modeling_auto as auto

    name = type(model).__name__
    masked = name.endswith("ForMaskedLM") or name in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    causal = name.endswith("ForCausalLM") or name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if masked and causal:  # XLM can be either; its config decides
        masked = not getattr(model.config, "causal", False)
    return "masked" if masked else "causal" if causal else None


def longest_input(model: PreTrainedModel) -> int:
    """Return how many tokens a model can read at once; 2^30 where nothing limits them."""
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None) or -1]
    for name, module in model.named_modules():
        # RoBERTa and related models start to count positions after the padding token's.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min((limit for limit in limits if limit > 0), default=1 << 30)


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Turn off dropout, and the cache of keys and values; restore both, for each module, afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    config = model.config.get_text_config()
    cached = getattr(config, "use_cache", None)
    model.eval()
    if cached is not None:
        config.use_cache = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        if cached is not None:
            config.use_cache = cached

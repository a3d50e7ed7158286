"""What a model predicts, and how much it can read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...methods.calibration import Kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def kind_of(model: PreTrainedModel) -> Kind:
    """Return what a model predicts, judged by its class and its output head.

    Raises:
        ValueError: it is an encoder-decoder without a head.
    """
    from transformers.models.auto import modeling_auto as auto

    name = type(model).__name__
    if name.endswith(_CLASSIFIERS):
        return "classifier"
    if model.get_output_embeddings() is None:
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"model: expected a head on an encoder-decoder, got {name}; load its class for "
                "conditional generation"
            )
        return "sentence"
    if model.config.is_encoder_decoder:
        return "encoder-decoder"
    masked = name.endswith("ForMaskedLM") or name in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    if masked and name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():  # XLM, whose config decides
        masked = not getattr(model.config, "causal", False)
    return "masked" if masked else "causal"


def longest_input(model: PreTrainedModel) -> int:
    """Return how many tokens a model can read at once; 2^30 where nothing limits them."""
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None) or -1]
    for name, module in model.named_modules():
        # RoBERTa and related models start to count positions after the padding token's.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min((limit for limit in limits if limit > 0), default=1 << 30)

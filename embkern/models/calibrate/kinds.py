"""What a model predicts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...methods.calibration import Kind
from ..inference import language_kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def kind_of(model: PreTrainedModel) -> Kind:
    """Return what a model predicts, judged by its class and its output head.

    Raises:
        ValueError: it is an encoder-decoder without a head.
    """
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
    return language_kind(model) or "causal"

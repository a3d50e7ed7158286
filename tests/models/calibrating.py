"""Tiny models, a tokenizer and texts for the tests of calibration."""

from __future__ import annotations

import numpy as np
import torch
import transformers as T

from embkern.models.calibrate import recording
from tests.example_models import MODELS, V, build, word_tokenizer

WORDS = [f"w{i}" for i in range(V - 8)]


def tokenizer(**special: str) -> T.PreTrainedTokenizerFast:
    """A tokenizer of as many words as the tiny models have rows."""
    made = word_tokenizer()
    made.add_special_tokens({"mask_token": "[MASK]", **special})
    made.add_tokens(WORDS)
    made.model_input_names = ["input_ids", "attention_mask"]
    assert len(made) == V
    return made


def texts(count: int = 12, words: int = 11) -> list[str]:
    generator = np.random.default_rng(5)
    return [" ".join(generator.choice(WORDS, words)) for _ in range(count)]


def sharper(model, factor: float = 12.0):
    """In float64, with a larger table, whose predictions are far from uniform."""
    model = model.double()
    with torch.no_grad():
        for module in {id(each): each for each in (model.get_input_embeddings(), model.get_output_embeddings())
                       if each is not None}.values():
            if module.weight is not model.get_input_embeddings().weight or module is model.get_input_embeddings():
                module.weight.mul_(factor)
    return model


def double(name: str):
    return sharper(build(name))


__all__ = ["MODELS", "WORDS", "V", "double", "recording", "texts", "tokenizer"]

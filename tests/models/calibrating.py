"""Tiny models in float64, a tokenizer and texts for the tests of calibration."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import transformers as T

from embkern.models.calibrate import passes
from tests.conftest import seed_of
from tests.example_models import _COMMON, MODELS, H, V, word_tokenizer

WORDS = [f"w{i}" for i in range(V - 8)]

CAPPED = {
    "gemma2": lambda: T.Gemma2ForCausalLM(
        T.Gemma2Config(**_COMMON, head_dim=8, final_logit_softcapping=3.0, attn_logit_softcapping=20.0)
    ),
    "granite": lambda: T.GraniteForCausalLM(T.GraniteConfig(**_COMMON, logits_scaling=0.5)),
}
CLASSIFIERS = {
    "sequence": lambda: T.BertForSequenceClassification(T.BertConfig(**_COMMON, num_labels=3)),
    "regression": lambda: T.BertForSequenceClassification(T.BertConfig(**_COMMON, num_labels=1)),
    "labels": lambda: T.BertForSequenceClassification(
        T.BertConfig(**_COMMON, num_labels=3, problem_type="multi_label_classification")
    ),
    "decoder": lambda: T.GPT2ForSequenceClassification(
        T.GPT2Config(vocab_size=V, n_embd=H, n_layer=2, n_head=4, n_positions=64, num_labels=3)
    ),
    "token": lambda: T.BertForTokenClassification(T.BertConfig(**_COMMON, num_labels=4)),
    "answer": lambda: T.BertForQuestionAnswering(T.BertConfig(**_COMMON)),
}


def tokenizer() -> Any:
    """Return a tokenizer with as many words as the tiny models have rows."""
    made = word_tokenizer()
    made.add_special_tokens({"mask_token": "[MASK]"})
    made.add_tokens(WORDS)
    made.model_input_names = ["input_ids", "attention_mask"]
    assert len(made) == V
    return made


def distinct_words(seed: int = 0) -> str:
    """Return a text that has every word once."""
    return " ".join(np.random.default_rng(seed).permutation(WORDS))


def sharp(name: str, scale: float = 12.0) -> Any:
    """Return a model in float64 with a larger table, so that its predictions are far from uniform."""
    torch.manual_seed(seed_of(3))
    model = {**MODELS, **CAPPED, **CLASSIFIERS}[name]().double().eval()
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        for weight in {id(each.weight): each.weight for each in modules if each is not None}.values():
            weight.mul_(scale)
    return model


def untied(model: Any) -> tuple[Any, list[Any]]:
    """Return a copy of the model whose embeddings and head share nothing, and the embeddings."""
    model = copy.deepcopy(model)
    table = model.get_input_embeddings().weight
    embeddings = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if getattr(module, "weight", None) is table:
            own = copy.deepcopy(module)
            own.weight = torch.nn.Parameter(table.detach().clone())
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], own)
            if isinstance(own, torch.nn.Embedding):
                embeddings.append(own)
    return model, embeddings


@contextlib.contextmanager
def stopping_after(monkeypatch: Any, batches: int, error: type[BaseException]) -> Iterator[None]:
    """Raise an error in passes of the block after some batches."""
    add = passes._add_gradients

    def stopping(loss: Any, recording: Any, found: Any) -> None:
        if found.batches == batches:
            raise error
        add(loss, recording, found)

    with monkeypatch.context() as patch:
        patch.setattr(passes, "_add_gradients", stopping)
        yield


__all__ = [
    "CAPPED",
    "CLASSIFIERS",
    "MODELS",
    "WORDS",
    "H",
    "V",
    "distinct_words",
    "sharp",
    "stopping_after",
    "tokenizer",
    "untied",
]

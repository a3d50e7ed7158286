"""Texts, tokenizers and tiny language models for tests of perplexity."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import Any

import torch
import transformers as T
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from embkern.evaluate.windows import Window, masked_windows
from tests.example_models import build
from tests.text.test_frequencies import SENTENCES

TEXTS = SENTENCES.read_text(encoding="utf-8").splitlines()[:24]
VOCABULARY = 101  # size of the vocabulary of tests.models
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)


def wordpieces(special: list[str]) -> dict[str, int]:
    """Return the most frequent pieces of the words of TEXTS, letters first; the same in every run."""
    counts: Counter[str] = Counter()
    for word in re.findall(r"\w+|[^\w\s]", " ".join(TEXTS)):
        for start, end in itertools.combinations(range(min(len(word), 9) + 1), 2):
            counts[("##" if start else "") + word[start:end]] += 1
    ordered = sorted(counts, key=lambda piece: (len(piece.removeprefix("##")) > 1, -counts[piece], piece))
    return {piece: number for number, piece in enumerate([*special, *ordered][:VOCABULARY])}


def subwords(kind: str = "wordpiece") -> T.PreTrainedTokenizerFast:
    """Return a tokenizer for the tiny models, which splits many words into several tokens."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if kind == "wordpiece":
        raw = Tokenizer(models.WordPiece(wordpieces(special), unk_token="[UNK]"))
        raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        raw.add_special_tokens(special)
    else:
        raw = Tokenizer(models.BPE(unk_token="[UNK]"))
        spaces = {"byte level": pre_tokenizers.ByteLevel, "sentencepiece": pre_tokenizers.Metaspace}
        raw.pre_tokenizer = spaces[kind]()
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
        raw.train_from_iterator(TEXTS, trainer)
    ids = [(token, raw.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    raw.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ids)
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True))
    tokens = {f"{name}_token": token for name, token in names.items()}
    return T.PreTrainedTokenizerFast(tokenizer_object=raw, **tokens)


def sharp(name: str) -> Any:
    """Return a model whose predictions are far from uniform, so that a wrong prediction changes the loss."""
    model = build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return model


def masks(texts: Any, tokenizer: Any, **changed: Any) -> list[Window]:
    """Return masked windows of texts."""
    settings = dict(vocabulary_size=VOCABULARY, max_length=64, seed=0, probability=0.15, masking="80-10-10")
    return list(masked_windows(texts, tokenizer, **{**settings, **changed}))

"""Small tokenizers of three kinds, and texts for them."""

from __future__ import annotations

from importlib import resources

import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from embkern.text.prior import vocabulary_prior

SENTENCES = resources.files("embkern") / "data" / "sentences.txt"

LINES = ["The cat, the dog and the bird.", "A cat sat.", "(the cat)"]

WORDS = [
    "the",
    "a",
    "cat",
    "##s",
    "dog",
    "and",
    "bird",
    "sat",
    "sit",
    "##ting",
    *(f"word{i}" for i in range(50)),
]

ALPHABET = [chr(c) for c in range(33, 127) if not chr(c).isupper() and chr(c) != "a"]


def wordpiece(words=WORDS, alphabet=ALPHABET, **options):
    """As BERT's: special and unused tokens, characters in the order of Unicode, words by frequency."""
    tokens = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *alphabet, *words, "##é"]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    raw = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    raw.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=special)
    raw.enable_truncation(4)  # as many a tokenizer.json has it: counting reads on
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
        mask_token="[MASK]", model_max_length=4, **options,
    )  # fmt: skip


def byte_level():
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    raw.train_from_iterator(SENTENCES.read_text().splitlines(), trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")


def of(counts, tokenizer):
    """Counts by token, without zeros."""
    ids = counts.counts.nonzero().flatten()
    return dict(zip(tokenizer.convert_ids_to_tokens(ids.tolist()), counts.counts[ids].tolist(), strict=True))


def prior_of(tokenizer):
    return lambda V: vocabulary_prior(tokenizer, V)

"""The two kinds of reference models: tokenizer, model and loss of a masked and of a causal one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embkern.nn.ngrammer import Combine

VOCABULARY = 8192
LENGTH = 128  # tokens of a block, and the limit of the models
MASKED, AS_MASK, AS_RANDOM = 0.15, 0.8, 0.1  # BERT's shares: of tokens, and of the masked ones
MASKED_IN_TRAINING = 0.25  # of tokens; a larger share gives more to learn in each step
MINUTES = 8.0
ALPHABET = 1000  # the largest number of characters of WordPiece; rarer ones are unknown
BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
END_OF_TEXT = "<|endoftext|>"  # GPT-2's

Losses = tuple[Tensor, Tensor]  # of some tokens, and the ids of these tokens


@dataclass(frozen=True)
class Recipe:
    """The settings of a run; with the text and the machine, they determine the weights."""

    steps: int
    batch: int = 16  # blocks
    layers: int = 4
    width: int = 256
    vocabulary: int = VOCABULARY
    learning_rate: float = 2e-3
    warmup: float = 0.06  # of the steps; the rate then falls to zero in a straight line
    weight_decay: float = 0.1
    seed: int = 0
    ngrammer: Combine | None = (
        None  # how n-gram embeddings enter those of the tokens: add or concat; None: not
    )


def bert_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """Train a lower-case WordPiece tokenizer."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizer

    trained = BertWordPieceTokenizer(lowercase=True)
    counts = Counter(character for text in texts for character in trained.normalize(text))
    letters = sorted(counts, key=lambda each: (-counts[each], each))[: min(ALPHABET, vocabulary // 4)]
    trained.train_from_iterator(
        texts,
        vocab_size=vocabulary,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        # The trainer numbers the pieces within words in an order that differs between runs, and the numbers
        # decide ties; special tokens are numbered first, as given. The tokenizer below takes names only.
        special_tokens=[*BERT_SPECIAL, *(f"##{letter}" for letter in letters if not letter.isspace())],
        show_progress=False,
    )
    return BertTokenizer(vocab=trained.get_vocab(), do_lower_case=True, model_max_length=LENGTH)


def gpt_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """Train a byte-level BPE tokenizer; one special token is its begin, end and padding."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Tokenizer

    trained, special = ByteLevelBPETokenizer(), [END_OF_TEXT]
    trained.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=special, show_progress=False)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return GPT2Tokenizer(vocab=model["vocab"], merges=merges, pad_token=END_OF_TEXT, model_max_length=LENGTH)


def bert_model(recipe: Recipe, tokenizer: Any) -> nn.Module:
    """Return an untrained BERT with a tied masked-language-model head."""
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=max(1, recipe.width // 64),
            intermediate_size=4 * recipe.width,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def gpt_model(recipe: Recipe, tokenizer: Any) -> nn.Module:
    """Return an untrained GPT-2 with a tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=recipe.width,
            n_layer=recipe.layers,
            n_head=max(1, recipe.width // 64),
            n_positions=LENGTH,
            activation_function="gelu_pytorch_tanh",  # GPT-2's own formula, in one kernel
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def bert_loss(model: Any, blocks: Tensor, tokenizer: Any, generator: torch.Generator) -> Losses:
    """Return the loss of every masked token, and their ids."""
    special = torch.tensor(tokenizer.all_special_ids)
    draw = torch.rand(blocks.shape, generator=generator)
    share = MASKED_IN_TRAINING if model.training else MASKED
    masked = (draw < share) & ~torch.isin(blocks, special)
    inputs = blocks.masked_fill(masked & (draw < share * AS_MASK), tokenizer.mask_token_id)
    random = torch.randint(len(tokenizer), blocks.shape, generator=generator)
    inputs = torch.where(masked & (draw > share * (1 - AS_RANDOM)), random, inputs)
    device = next(model.parameters()).device
    hidden = model.bert(inputs.to(device)).last_hidden_state[masked.to(device)]
    targets = blocks[masked]
    return F.cross_entropy(model.cls(hidden).float(), targets.to(device), reduction="none"), targets


def gpt_loss(model: Any, blocks: Tensor, tokenizer: Any, generator: torch.Generator) -> Losses:
    """Return the loss of every token but the first of a block, and their ids; draws nothing."""
    device = next(model.parameters()).device
    hidden = model.transformer(blocks.to(device), use_cache=False).last_hidden_state[:, :-1]
    targets = blocks[:, 1:].flatten()
    logits = model.lm_head(hidden.flatten(0, 1)).float()
    return F.cross_entropy(logits, targets.to(device), reduction="none"), targets


@dataclass(frozen=True)
class Kind:
    """The parts in which a masked and a causal model differ."""

    tokenizer: Callable[[Sequence[str], int], Any]  # of texts and the size of the vocabulary
    model: Callable[[Recipe, Any], nn.Module]
    loss: Callable[[Any, Tensor, Any, torch.Generator], Losses]
    before_block: str  # special tokens
    before_text: str
    after_text: str
    steps: int  # about MINUTES of work on two cores with instructions for bfloat16


KINDS = {
    "bert": Kind(bert_tokenizer, bert_model, bert_loss, "[CLS]", "", "[SEP]", 1300),
    "gpt": Kind(gpt_tokenizer, gpt_model, gpt_loss, "", END_OF_TEXT, "", 910),
}

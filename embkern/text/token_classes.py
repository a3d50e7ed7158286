"""Classes of tokens by how they are written, and the share that each has of the rare tokens of a text."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .token_names import TokenName, token_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RARE = 5  # a token that was counted at most so often is rare
# Strength, in tokens, of the prior's own shares of the classes. Texts of 18k tokens have a few thousand rare
# ones, those of millions some ten thousand.
CLASS_STRENGTH = 100.0


def token_classes(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> Tensor:
    """Return the class of every token, (V,) int64: -1 for special and unused ones, else 0 and above.

    Tokens of a class consist of letters of one script in one case, of digits, of other characters in ASCII or
    beyond, or of white space; letters with other characters between them are a class of their own. Whether a
    token begins a word does not count: technical text has more rare pieces of words than other text has.

    Args:
        tokenizer: the tokenizer of the model.
        num_embeddings: V, the number of rows of the model's table.
    """
    numbers: dict[tuple[str, ...], int] = {}
    found = []
    for name in token_names(tokenizer, range(num_embeddings)):
        key = _class_of(name)
        found.append(-1 if key is None else numbers.setdefault(key, len(numbers)))
    return torch.tensor(found, dtype=torch.int64)


def adapted_prior(counts: Tensor, prior: Tensor, classes: Tensor) -> Tensor:
    """Return a prior in which each class of tokens has the share of rare tokens that it has in a text.

    Tokens with ``counts <= 5`` keep the sum of their priors, which each class gets by the number of its
    tokens that were read 1 to 5 times: those say which ones were nearly read, as in the estimate of Good and
    Turing. Within a class the prior decides. The order of a vocabulary does not tell that a text has no
    Chinese, or names in capitals::

        expected = torch.zeros(C).index_add(0, classes[rare], prior[rare])
        read     = torch.zeros(C).index_add(0, classes[rare], counts[rare])
        share    = read + 100 * expected / expected.sum()
        factor   = share / expected * (expected.sum() / share.sum())
        adapted[rare] = prior[rare] * factor[classes[rare]]

    Args:
        counts: (V,), how often each token was counted.
        prior: (V,) float64, relative frequencies.
        classes: (V,) int64, as ``token_classes`` returns them; tokens of class -1 keep their prior.

    Returns:
        (V,) float64, with the sum of the prior.
    """
    rare = torch.nonzero((counts <= RARE) & (classes >= 0) & (prior > 0)).flatten()
    if not len(rare):
        return prior
    own, number = prior[rare], classes[rare]
    expected = torch.zeros(int(number.max()) + 1, dtype=torch.float64).index_add(0, number, own)
    read = torch.zeros_like(expected).index_add(0, number, counts[rare].double())
    share = read + CLASS_STRENGTH * expected / expected.sum()
    factor = share / expected * (expected.sum() / share.sum())
    return prior.index_copy(0, rare, own * factor[number])


def _class_of(name: TokenName) -> tuple[str, ...] | None:
    """Return how a token is written; None for a special or unused one."""
    if name.text is None or name.kind is not None:
        return None
    text = name.text.removesuffix("</w>").removeprefix("##").strip()
    letters = [character for character in text if character.isalpha()]
    if letters:
        return _script(letters), _case(letters), "" if len(letters) == len(text) else "+"
    if not text:
        return ("white space",)
    if any(character.isdigit() for character in text):
        return ("digits",)
    return ("ASCII",) if text.isascii() else ("beyond ASCII",)


def _script(letters: list[str]) -> str:
    """Return the script of the first letter that is not in ASCII: the first word of its name in Unicode."""
    beyond = next((letter for letter in letters if not letter.isascii()), None)
    return "ASCII" if beyond is None else unicodedata.name(beyond, "no name").split()[0]


def _case(letters: list[str]) -> str:
    text = "".join(letters)
    if text.islower():
        return "lower"
    if text.isupper():
        return "upper" if len(text) > 1 else "title"
    if text[0].isupper() and text[1:].islower():
        return "title"
    return "none" if text.lower() == text.upper() else "mixed"

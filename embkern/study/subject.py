"""The dense model of a study, and a compressed table beside it."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from ..fidelity import embed_sentences
from ..fidelity.sentences import pooling_of
from ..models.checkpoint import model_bytes
from ..models.find_table import UnsupportedModelError, find_table
from ..models.swap import check_installable
from ..text.reading import read_texts
from ..text.token_names import TokenName, token_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..recipe import Recipe

NEIGHBORS = 6  # neighbours listed per word


@dataclass
class Subject:
    """The dense model of a study, and the texts it is measured on.

    Attributes:
        source: its directory or hub name.
        frequencies: (V,) float64, the expected frequency of each token.
        counted: a description of where the frequencies come from.
        words: ids of the tokens whose neighbours are listed.
        sentences: sentences to embed, if any.
        dataset: text to measure perplexity on, as ``embkern.text.read_texts`` takes it, if any.
        protocol: settings of ``evaluate_perplexity``.
        models: directory for the compressed models, if they are saved.
        fisher: Fisher weights (V, H) for the methods that take them, if any.
        seed: random seed of every sample.
    """

    source: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    frequencies: Tensor
    counted: str
    words: list[int]
    sentences: list[str] | None = None
    dataset: str | None = None
    protocol: dict[str, Any] = field(default_factory=dict)
    models: Path | None = None
    fisher: Tensor | None = None
    seed: int = 0

    @functools.cached_property
    def weight(self) -> Tensor:
        """The dense table, (V, H)."""
        return find_table(self.model).weight.detach()

    @functools.cached_property
    def tied(self) -> bool:
        """Whether an output head shares the table."""
        return find_table(self.model).tied

    @functools.cached_property
    def nearest(self) -> list[tuple[list[int], list[float]]]:
        """Ids and cosines of the rows of the dense table nearest to each word."""
        return nearest_rows(self.weight, self.words)

    @functools.cached_property
    def bytes(self) -> int:
        """Bytes of the dense model."""
        return model_bytes(self.model)

    @functools.cached_property
    def embedded(self) -> Tensor:
        """Embeddings of the sentences by the dense model."""
        return self.embed()

    def embed(self) -> Tensor:
        """Embed the sentences with the model as it is now."""
        assert self.sentences is not None
        return embed_sentences(self.model, self.tokenizer, self.sentences, pooling=pooling_of(self.source))

    def texts(self) -> Iterator[str]:
        """Read the data set."""
        assert self.dataset is not None
        return read_texts(self.dataset)

    def token(self, index: int) -> str:
        """Return the name of a token, or its id after ``#`` if the tokenizer has no name for it."""
        return self.tokens([index])[0]

    def tokens(self, ids: list[int]) -> list[str]:
        """Return the names of tokens."""
        texts = (name.text for name in self.names(ids))
        return [f"#{i}" if text is None else text for i, text in zip(ids, texts, strict=True)]

    def names(self, ids: list[int]) -> list[TokenName]:
        """Return texts and kinds of tokens; without a tokenizer they have none."""
        return [TokenName(None)] * len(ids) if self.tokenizer is None else token_names(self.tokenizer, ids)


class Candidate:
    """A compressed table, made by a method at a ratio.

    Attributes:
        name: method and ratio, as they are shown.
        table: the compressed table.
        seconds: time that the method took.
    """

    def __init__(self, subject: Subject, recipe: Recipe, name: str) -> None:
        self.subject, self.recipe, self.name = subject, recipe, name
        started = time.perf_counter()
        quiet: dict[str, Any] = {"progress": False} if recipe.method == "autoencoder" else {}
        self.table: Any = recipe.factorize(
            subject.weight, subject.frequencies, fisher=subject.fisher, **quiet
        )
        self.seconds = time.perf_counter() - started

    @property
    def fits(self) -> bool:
        """Whether the model can hold the table, also in a tied head."""
        try:
            check_installable(find_table(self.subject.model), self.recipe)
        except UnsupportedModelError:
            return False
        return True

    @functools.cached_property
    def live(self) -> Any:
        """The table on the model's device and in the dtype that the model computes in."""
        weight = self.subject.weight
        return self.table.to(device=weight.device, dtype=weight.dtype)

    @functools.cached_property
    def rows(self) -> Tensor:
        """The decoded table, (V, H)."""
        return self.live.to_dense()


def nearest_rows(table: Tensor, ids: list[int]) -> list[tuple[list[int], list[float]]]:
    """Return the ids and cosines of the ``NEIGHBORS`` rows nearest to each of some rows."""
    normal = F.normalize(table.float(), dim=1)
    similarity = normal[ids] @ normal.t()
    similarity[range(len(ids)), ids] = -2.0  # a row is not its own neighbour
    best = similarity.topk(min(NEIGHBORS, len(table) - 1), dim=1)
    cosines = [[round(each, 6) for each in row] for row in best.values.tolist()]
    return list(zip(best.indices.tolist(), cosines, strict=True))

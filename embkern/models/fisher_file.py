"""Files of Fisher weights: ``embkern fisher`` writes them, compression with Fisher weights reads them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from ..io.atomic import new_file
from ..io.tensor_format import TensorFormat
from ..text.reading import read_texts
from .fisher import fisher_weights
from .loading import load_model, required_tokenizer

FORMAT = TensorFormat("embkern.fisher/1", "Fisher weights", required=("weights",), settings=("facts",))


class FisherSummary(BaseModel):
    """A summary of Fisher weights, as ``embkern fisher`` prints it."""

    num_embeddings: int
    embedding_dim: int
    rows_with_weight: int
    head: bool

    def rows(self) -> dict[str, str]:
        """Return names and values to print."""
        return {
            "table": f"{self.num_embeddings:,} x {self.embedding_dim:,}",
            "rows with a weight": f"{self.rows_with_weight:,}",
            "gradients": "of the lookups and the tied head" if self.head else "of the lookups",
        }


def fisher_files(
    model: str | os.PathLike,
    sources: Iterable[str | os.PathLike],
    output: str | os.PathLike,
    *,
    tokens: int | None = 65536,
    head: bool = False,
    length: int = 128,
    seed: int = 0,
    errors: str = "strict",
    overwrite: bool = False,
    progress: bool | None = None,
) -> FisherSummary:
    """Measure the Fisher weights of a model's table on texts, and save them.

    Args:
        model: a directory, or a name on the hub.
        sources: sources of text, as ``read_texts`` takes them.
        output: file to write: ``weights`` (V, H) in fp32, which ``load_fisher`` reads.
        tokens: number of tokens after which reading stops; None reads all text.
        head: whether gradients through a tied output head count, too.
        length: tokens per text; longer texts are truncated.
        seed: random seed of masks, and of directions for a model without a head.
        errors: what to do with bytes that are not UTF-8 text: ``strict`` raises, ``replace`` reads U+FFFD.
        overwrite: whether to replace an existing file.
        progress: whether to show a progress bar on stderr; None shows it on a terminal.

    Raises:
        ValueError: a source is not text or has none with a loss, or the model is damaged or has no table that
            can be replaced; the message names it.
        FileNotFoundError: the model, its tokenizer, a source, or the directory of ``output`` does not exist.
        FileExistsError: ``output`` exists and ``overwrite`` is False, or it is one of the sources.
        OSError: ``output`` cannot be written.
    """
    sources = list(sources)
    path, tokenizer = new_file(output, overwrite, sources=sources), required_tokenizer(model)
    texts = itertools.chain.from_iterable(read_texts(source, errors=errors) for source in sources)
    settings: dict[str, Any] = {"tokens": tokens, "head": head, "max_length": length, "seed": seed}
    weights = fisher_weights(load_model(model), tokenizer, texts, progress=progress, **settings)
    FORMAT.save(path, {"weights": weights}, facts=settings)
    return FisherSummary(
        num_embeddings=weights.shape[0],
        embedding_dim=weights.shape[1],
        rows_with_weight=int(weights.any(1).sum()),
        head=head,
    )


def load_fisher(path: str | os.PathLike) -> Tensor:
    """Return the weights (V, H) of a file of ``embkern fisher``, fp32 on the CPU.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated, edited, or not a file of Fisher weights.
    """

    def build(tensors: dict[str, Any], _: dict[str, Any]) -> Tensor:
        weights: Tensor = tensors["weights"]
        if weights.dim() != 2 or weights.dtype != torch.float32:
            raise ValueError(f"weights: expected (V, H) in fp32, got {tuple(weights.shape)} {weights.dtype}")
        return weights

    return FORMAT.load(path, build)

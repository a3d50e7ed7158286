"""What the benchmark of language models compresses, and on which text it is measured."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from embkern.evaluate.batches import Batch, grouped
from embkern.evaluate.language_model import SplitModel
from embkern.evaluate.windows import causal_windows
from embkern.models.find_table import find_table
from embkern.models.inference import evaluating, longest_input
from embkern.models.loading import load_model, load_tokenizer
from embkern.text.counts import TokenCounts, count_tokens
from embkern.text.frequencies import frequencies_of
from embkern.text.prior import vocabulary_prior

from .text import docstrings
from .tools.installed_text import installed_documents, split

COUNTED = 70_000  # sentences of docstrings
MOMENT_TOKENS = 8192
SCORED_KINDS = ("manual pages", "documentation", "distributions")
SCORED_CHARS = 7_000  # of each kind
PARTS = ("test", "valid")  # of the scored text, of different documents
WINDOW = 1024


class Subject:
    """A model and its table, token frequencies, and the second moment of its hidden states."""

    def __init__(self, directory: Path) -> None:
        self.model, self.tokenizer = load_model(directory).eval(), load_tokenizer(directory)
        assert self.tokenizer is not None, f"no tokenizer in {directory}"
        self.table = find_table(self.model).weight.detach()

    @functools.cached_property
    def prior(self) -> Tensor:
        """Frequencies by the order of the vocabulary."""
        return vocabulary_prior(self.tokenizer, len(self.table))

    @property
    def window(self) -> int:
        """Tokens of a window: as many as the model reads, at most ``WINDOW``."""
        return min(WINDOW, longest_input(self.model))

    @functools.cached_property
    def counted(self) -> TokenCounts:
        """Counts of docstrings."""
        sentences, V = counted_sentences(), len(self.table)
        return count_tokens(sentences, self.tokenizer, num_embeddings=V, progress=False)

    @functools.cached_property
    def counts(self) -> Tensor:
        """Expected frequencies, from counts of docstrings and the prior."""
        return frequencies_of(self.counted, len(self.table), self.tokenizer)[0]

    @functools.cached_property
    def counts_by_class(self) -> Tensor:
        """Likewise, with the prior that ``compress`` takes with a calibration."""
        return frequencies_of(self.counted, len(self.table), self.tokenizer, by_class=True)[0]

    @functools.cached_property
    @torch.no_grad()
    def moment(self) -> Tensor:
        """``(h.t() @ h) / N`` of the hidden states that the head reads, (H, H) fp64, on docstrings."""
        length = self.window
        windows = causal_windows(
            docstrings(), self.tokenizer, max_length=length, stride=length, max_tokens=MOMENT_TOKENS
        )
        H = self.table.shape[1]
        total, count = torch.zeros(H, H, dtype=torch.float64), 0
        with evaluating(self.model):
            split_model = SplitModel(self.model)
            for group in grouped(windows, 2):
                hidden = split_model.hidden(Batch.of(group, self.model)).double()
                total, count = total + hidden.t() @ hidden, count + len(hidden)
        return total / count


@functools.cache
def scored_text(part: str = PARTS[0]) -> tuple[list[str], dict[str, int]]:
    """Return a part of the paragraphs of another kind than docstrings, and their characters by source."""
    documents = list(installed_documents(SCORED_KINDS))
    texts, sources = [], {}
    for kind in SCORED_KINDS:
        of_kind = [document for document in documents if document.source == kind]
        own = split(of_kind, held_out_chars=SCORED_CHARS, train_chars=0).named()[part]
        texts += own
        sources[kind] = sum(map(len, own))
    return texts, sources


def counted_sentences() -> list[str]:
    """Return the sentences of docstrings in which tokens are counted."""
    return docstrings()[:COUNTED]

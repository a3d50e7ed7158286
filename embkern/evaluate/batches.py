"""Windows to batches: padded inputs of a language model, with the scored positions and their targets."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .windows import Window

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SORTED_BATCHES = 32  # the windows of this many batches are sorted by length, which saves padding


class Batch(NamedTuple):
    """Windows as a model reads them.

    Attributes:
        inputs: arguments of the model.
        positions: (n,) scored positions of its flattened output.
        targets: (n,) ids that they should predict.
    """

    inputs: dict[str, Tensor]
    positions: Tensor
    targets: Tensor

    @classmethod
    def of(cls, windows: Sequence[Window], model: PreTrainedModel) -> Batch:
        """Pad windows on the right; no token attends to padding, so its ids do not matter.

        Raises:
            ValueError: an id is beyond the model's vocabulary.
        """
        length = max(len(window.ids) for window in windows)
        ids = np.zeros((len(windows), length), np.int64)
        mask = np.zeros_like(ids)
        for row, window in enumerate(windows):
            ids[row, : len(window.ids)], mask[row, : len(window.ids)] = window.ids, 1
        inputs = {"input_ids": ids} if mask.all() else {"input_ids": ids, "attention_mask": mask}
        positions = np.concatenate([row * length + window.positions for row, window in enumerate(windows)])
        targets = np.concatenate([window.targets for window in windows])
        V = model.config.get_text_config().vocab_size
        if max(ids.max(), targets.max()) >= V:
            raise ValueError(f"tokenizer: has ids beyond the model's {V} tokens; it belongs to another model")
        device = model.device
        return cls(
            {name: torch.from_numpy(array).to(device) for name, array in inputs.items()},
            torch.from_numpy(positions).to(device),
            torch.from_numpy(targets).to(device),
        )


def grouped(windows: Iterator[Window], size: int) -> Iterator[list[Window]]:
    """Yield groups of ``size`` windows of similar length; windows without a scored position are dropped."""
    scored = (window for window in windows if len(window.positions))
    while block := sorted(itertools.islice(scored, SORTED_BATCHES * size), key=lambda each: len(each.ids)):
        for start in range(0, len(block), size):
            yield block[start : start + size]

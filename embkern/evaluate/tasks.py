"""A task to fine-tune on: its hyper-parameters, its records, and the model with its head."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field

from ..models.config import check_config
from ..models.find_table import input_embeddings
from ..models.loading import not_loaded
from .records import find_file

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer


class Training(BaseModel):
    """Hyper-parameters of a task. Trainer's optimiser is AdamW; its learning rate falls linearly to zero."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: float = Field(default=3.0, gt=0)
    learning_rate: float = Field(gt=0)
    batch_size: int = Field(ge=1, description="records per step, over all devices and accumulated parts")
    accumulation: int = Field(
        default=1, ge=1, description="parts that a step is divided into, to need less memory"
    )
    max_length: int = Field(ge=8, description="tokens per text or per window; a longer text is truncated")
    stride: int = Field(default=0, ge=0, description="tokens that adjacent windows of a long text share")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="precision of matrix products; the weights are fp32"
    )


@dataclass(frozen=True)
class Prepared:
    """The tokenised records of a task.

    Attributes:
        train: token ids and labels, one row per text or window.
        score: returns the scores of a trainer's model on the evaluation records, times 100, by metric.
        train_records, eval_records: number of records.
    """

    train: Dataset
    score: Callable[[Trainer], dict[str, float]]
    train_records: int
    eval_records: int


class Task(abc.ABC):
    """A task to fine-tune on.

    Attributes:
        name: name of the task, and of its folder in a directory of local data.
        metrics: names of its metrics.
        training: the paper's hyper-parameters.
        splits: names of its splits, the training split first.
        text_columns: columns that must hold text.
    """

    name: str
    metrics: tuple[str, ...]
    training: Training
    splits: tuple[str, ...]
    text_columns: tuple[str, ...]

    @abc.abstractmethod
    def load_model(self, name: str) -> PreTrainedModel:
        """Return the pretrained model in fp32 with the task's head, drawn from torch's generator."""

    @abc.abstractmethod
    def read_split(self, split: str, data: Path | None) -> Dataset:
        """Return the records of a split from the hub's data set, or from a file in ``data``."""

    @abc.abstractmethod
    def prepare(
        self, splits: list[Dataset], tokenizer: PreTrainedTokenizerBase, training: Training
    ) -> Prepared:
        """Check and tokenise the records of all splits."""

    def files(self, data: Path) -> list[Path]:
        """Return the files of local data, one per split."""
        return [find_file(data, split) for split in self.splits]


def load_with_head(kind: str, name: str, **config: Any) -> PreTrainedModel:
    """Load a pretrained model in fp32 with the head of an auto class, such as a sequence classifier.

    Raises:
        FileNotFoundError: it is neither a directory nor a model that the hub serves.
        ValueError: it cannot be loaded, or the checkpoint holds no token embeddings for it.
    """
    try:
        check_config(name)
        auto = getattr(transformers, kind)
        model, info = auto.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **config)
    except Exception as error:  # transformers and safetensors raise many kinds
        raise not_loaded(name, error) from error
    table = next(key for key, each in model.named_modules() if each is input_embeddings(model))
    if lost := [key for key in info["missing_keys"] if key.startswith(f"{table}.")]:
        raise ValueError(f"model: {name} does not hold {', '.join(lost)}; is it of another architecture?")
    return model

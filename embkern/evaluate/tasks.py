"""What a task to fine-tune on is, and its records: from the hub, or from files of the same columns."""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..io.errors import reason_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

_BUILDERS = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}  # of the datasets library


class Training(BaseModel):
    """How a task is trained. Optimiser and schedule are Trainer's: AdamW, falling linearly to zero."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: float = Field(default=3.0, gt=0)
    learning_rate: float = Field(gt=0)
    batch_size: int = Field(ge=1, description="records of a step, over all devices and accumulated parts")
    accumulation: int = Field(
        default=1, ge=1, description="parts that a step's records are cut into, for memory"
    )
    max_length: int = Field(ge=8, description="tokens of a text, or of a window of it; the rest is cut off")
    stride: int = Field(default=0, ge=0, description="tokens that neighbouring windows of a long text share")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="of the products; weights are fp32"
    )


@dataclass(frozen=True)
class Prepared:
    """A task's records as a model takes them.

    Attributes:
        train: token ids and labels, one row per text or window.
        score: what a trainer's model reaches on the evaluation records, times 100, by metric.
        train_records, eval_records: how many records there are.
    """

    train: Dataset
    score: Callable[[Trainer], dict[str, float]]
    train_records: int
    eval_records: int


class Task(abc.ABC):
    """A task to fine-tune on.

    Attributes:
        name: also of its folder in a directory of local data.
        metrics: names of what it is scored by.
        training: the paper's hyper-parameters.
        splits: names of the splits that are read, the one to train on first.
        text_columns: that must hold text.
    """

    name: str
    metrics: tuple[str, ...]
    training: Training
    splits: tuple[str, ...]
    text_columns: tuple[str, ...]

    @abc.abstractmethod
    def load_model(self, name: str) -> PreTrainedModel:
        """Return the pretrained model in fp32 with the task's own head, drawn anew from torch's generator."""

    @abc.abstractmethod
    def read_split(self, split: str, data: Path | None) -> Dataset:
        """Return the records of a split: of the hub's data set, or of a file in ``data``."""

    @abc.abstractmethod
    def prepare(
        self, splits: list[Dataset], tokenizer: PreTrainedTokenizerBase, training: Training
    ) -> Prepared:
        """Check records and tokenise them."""

    def files(self, data: Path) -> list[Path]:
        """Return the files of local data, one per split."""
        return [find_file(data, split) for split in self.splits]


# ---- models ----------------------------------------------------------------------------------------------


def load_with_head(kind: str, name: str, **config: Any) -> PreTrainedModel:
    """Load a pretrained model in fp32 with the head of an auto class, such as a sequence classifier.

    Raises:
        FileNotFoundError: it is neither a directory nor to be had from the hub.
        ValueError: it cannot be loaded, or the checkpoint holds no token embeddings for it.
    """
    import torch
    import transformers

    from ..models.config import check_config
    from ..models.find_table import input_embeddings
    from ..models.loading import not_loaded

    try:
        check_config(name)
        auto = getattr(transformers, kind)
        model, info = auto.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **config)
    except Exception as error:  # transformers and safetensors raise many kinds; all mean the same here
        raise not_loaded(name, error) from error
    table = next(key for key, each in model.named_modules() if each is input_embeddings(model))
    if lost := [key for key in info["missing_keys"] if key.startswith(f"{table}.")]:
        raise ValueError(f"model: {name} does not hold {', '.join(lost)}; is it of another architecture?")
    return model


# ---- records ---------------------------------------------------------------------------------------------


def read_hub(name: str, config: str | None, split: str) -> Dataset:
    """Return a split of a data set on the hub, or of datasets' cache of it.

    Raises:
        FileNotFoundError: it cannot be had.
    """
    try:
        return require("datasets").load_dataset(name, config, split=split)
    except ImportError:
        raise
    except Exception as error:  # datasets and its network libraries raise many kinds
        raise FileNotFoundError(
            f"data: {name} cannot be had from the hub ({reason_of(error)}); "
            "data (--data DIR) reads local files"
        ) from error


def find_file(directory: Path, split: str, suffixes: tuple[str, ...] = tuple(_BUILDERS)) -> Path:
    """Return the file of a split in a directory of local data.

    Raises:
        FileNotFoundError: there is none.
    """
    for suffix in suffixes:
        if (path := directory / f"{split}{suffix}").is_file():
            return path
    raise FileNotFoundError(
        f"data: expected {split} with one of the suffixes {', '.join(suffixes)} in {directory}, found none"
    )


def read_file(path: Path) -> Dataset:
    """Return the records of a JSON-lines, CSV or Parquet file.

    Raises:
        ValueError: it is empty, or cannot be read.
    """
    load_dataset = require("datasets").load_dataset
    if path.stat().st_size == 0:
        raise ValueError(f"data: expected records, got an empty file: {path}")
    builder = _BUILDERS[path.suffix]
    # A sentence that says "None" or "NA" is one.
    options = {"keep_default_na": False} if builder == "csv" else {}
    try:
        return load_dataset(builder, data_files=str(path), split="train", **options)
    except Exception as error:  # pandas, pyarrow and datasets raise many kinds
        cause = error.__cause__ or error
        raise ValueError(f"data: {path} cannot be read: {reason_of(cause)}") from error


def check_records(records: Dataset, texts: tuple[str, ...], others: tuple[str, ...], place: str) -> None:
    """Raise ValueError unless there are records with these columns, those of text full of strings."""
    if missing := [column for column in (*texts, *others) if column not in records.column_names]:
        raise ValueError(
            f"data: {place}: expected columns {', '.join((*texts, *others))}, "
            f"got {', '.join(records.column_names)} (no {', '.join(missing)})"
        )
    if len(records) == 0:
        raise ValueError(f"data: {place}: expected records, found none")
    for column in texts:
        if (kind := getattr(records.features[column], "dtype", "lists")) not in (
            "string",
            "large_string",
        ):
            raise ValueError(f"data: {place}: expected text in column {column}, got {kind}")
    for column in (*texts, *others):
        if nulls := records.data.column(column).null_count:
            raise ValueError(f"data: {place}: column {column} has no value in {nulls} records")


def require(module: str, extra: str = "evaluate") -> Any:
    """Import an optional package; an ImportError says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is needed here: pip install 'embkern[{extra}]' ({error})") from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep transformers' notes on new heads, and the bars of transformers and datasets, off stderr."""
    from transformers.utils import logging

    datasets = require("datasets")
    verbosity = logging.get_verbosity()
    bars, more_bars = logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if more_bars:
            datasets.enable_progress_bars()

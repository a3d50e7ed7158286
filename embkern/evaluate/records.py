"""Records of tasks: data sets of the hub, or local files with the same columns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..io.errors import reason_of
from ..io.optional import require

if TYPE_CHECKING:
    from datasets import Dataset

_BUILDERS = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}  # names in the datasets library


def read_hub(name: str, config: str | None, split: str) -> Dataset:
    """Return a split of a data set on the hub, or in the local cache of datasets.

    Raises:
        FileNotFoundError: it cannot be loaded.
    """
    try:
        return require("datasets").load_dataset(name, config, split=split)
    except ImportError:
        raise
    except Exception as error:  # datasets and its network libraries raise many kinds
        raise FileNotFoundError(
            f"data: {name} cannot be loaded from the hub ({reason_of(error)}); "
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
    # "None" and "NA" are sentences, not missing values.
    options = {"keep_default_na": False} if builder == "csv" else {}
    try:
        return load_dataset(builder, data_files=str(path), split="train", **options)
    except Exception as error:  # pandas, pyarrow and datasets raise many kinds
        cause = error.__cause__ or error
        raise ValueError(f"data: {path} cannot be read: {reason_of(cause)}") from error


def check_records(records: Dataset, texts: tuple[str, ...], others: tuple[str, ...], place: str) -> None:
    """Raise ValueError unless there are records with these columns and without missing values."""
    if missing := [column for column in (*texts, *others) if column not in records.column_names]:
        raise ValueError(
            f"data: {place}: expected columns {', '.join((*texts, *others))}, "
            f"got {', '.join(records.column_names)} (no {', '.join(missing)})"
        )
    if len(records) == 0:
        raise ValueError(f"data: {place}: expected records, found none")
    for column in texts:
        kind = getattr(records.features[column], "dtype", "lists")
        if kind not in ("string", "large_string"):
            raise ValueError(f"data: {place}: expected text in column {column}, got {kind}")
    for column in (*texts, *others):
        if nulls := records.data.column(column).null_count:
            raise ValueError(f"data: {place}: column {column} has no value in {nulls} records")

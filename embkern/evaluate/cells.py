"""The cells of a fine-tuning study, one per task, method and seed, and the summary of their scores."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..experiments.engine import Result, key_of
from .tasks import Training
from .trainer import Freeze

RESULT_NAME = "result.json"


class CellSettings(BaseModel):
    """Everything that a cell's scores depend on, except other packages and the machine."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(description="a hub name, or the last part of a directory's path")
    model_digest: str = Field(description="hash of the directory's files, or the hub name")
    data_digest: str | None = Field(description="hash of the files of local data; null for the hub's")
    counts_digest: str | None = Field(
        description="hash of the sources of token frequencies, if the method uses them"
    )
    code_digest: dict[str, str] = Field(
        description="hashes of the code of the method, and of the code that trains and scores"
    )
    task: str
    method: str
    ratio: float | None = Field(description="the ratio asked for; null for the dense model")
    freeze: Freeze
    seed: int
    training: Training
    max_train_samples: int | None
    max_eval_samples: int | None

    @cached_property
    def dependencies(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        return self.model_dump(mode="json")

    @property
    def folder(self) -> Path:
        """The cell's folder in the study's directory; its name ends with a hash of the settings."""
        return Path(self.task) / f"{self.method}-seed{self.seed}-{key_of(self.dependencies)}"


class Cell(Result):
    """A finished cell, as its file holds it."""

    settings: CellSettings
    scores: dict[str, float] = Field(description="times 100, by metric, on the validation set")
    table_bytes: int = Field(description="bytes of the token embeddings as stored")
    ratio: float = Field(description="bytes of the dense table over table_bytes")
    trained_parameters: int
    train_records: int
    eval_records: int
    steps: int
    seconds: float = Field(description="of training, since the last resumption if it was interrupted")
    versions: dict[str, str]
    command: str | None = Field(default=None, description="the command line that ran the cell")

    def dependencies(self) -> dict[str, Any]:
        """Return the settings as JSON holds them."""
        return self.settings.dependencies


class Score(BaseModel):
    """A metric of a task and a method over the seeds."""

    task: str
    metric: str
    method: str
    ratio: float
    mean: float
    spread: float | None = Field(description="sample standard deviation; null for one seed")
    by_seed: dict[int, float]

    def __str__(self) -> str:
        """Return the mean, and the spread if there is one."""
        return f"{self.mean:.2f}" + ("" if self.spread is None else f" ± {self.spread:.2f}")


class FineTuned(BaseModel):
    """The result of a fine-tuning study."""

    model: str
    freeze: Freeze
    seeds: list[int]
    scores: list[Score]
    cells: list[Cell]


def summarize(cells: Sequence[Cell]) -> list[Score]:
    """Return mean and spread over the seeds per task, metric and method, in the order of the cells."""
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        for metric in cell.scores:
            groups.setdefault((cell.settings.task, metric, cell.settings.method), []).append(cell)
    scores = []
    for (task, metric, method), group in groups.items():
        values = {cell.settings.seed: cell.scores[metric] for cell in group}
        scores.append(
            Score(
                task=task,
                metric=metric,
                method=method,
                ratio=group[0].ratio,
                mean=statistics.fmean(values.values()),
                spread=statistics.stdev(values.values()) if len(values) > 1 else None,
                by_seed=values,
            )
        )
    return scores

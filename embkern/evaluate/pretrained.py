"""What the cells of a fine-tuning study share: model, tokenizer, compressed tables and tokenised data."""

from __future__ import annotations

import copy
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from ..experiments.dependencies import (
    code_hash,
    files_fingerprint,
    frequencies_code,
    method_code,
    model_fingerprint,
    text_fingerprint,
)
from ..methods import METHODS
from ..models.find_table import find_table
from ..models.inference import longest_input
from ..models.loading import load_tokenizer
from ..models.quantizer import install
from ..models.swap import check_installable
from ..recipe import Recipe
from ..tables import Table
from ..text.frequencies import token_frequencies
from .cells import CellSettings
from .records import read_file
from .tasks import Prepared, Task
from .trainer import freeze_table, train_and_score

DENSE = "dense"


class Pretrained:
    """The pretrained model of a study and its data; each part is made once, when a cell first needs it.

    Raises:
        FileNotFoundError: the directory of local data does not exist.
    """

    def __init__(
        self,
        name: str,
        data: str | os.PathLike | None,
        counts: str | os.PathLike | None,
        count_text: str | os.PathLike | None,
    ) -> None:
        if data is not None and not Path(data).is_dir():
            raise FileNotFoundError(f"data: expected a directory, found none at {data}")
        self.name, self._counts, self._count_text = name, counts, count_text
        self._data = None if data is None else Path(data)
        self._tables: dict[str, Table] = {}  # by method
        self._prepared: tuple[Any, Prepared] | None = None  # the last task only, as data sets are large

    # ---- what cells depend on

    @cached_property
    def model_digest(self) -> str:
        """A hash of the model's files, or its name on the hub."""
        return model_fingerprint(self.name)

    def counts_digest(self, method: str) -> str | None:
        """Return a hash of the sources of token frequencies, if a method uses them and there are any."""
        sources = [each for each in (self._counts, self._count_text) if each is not None]
        if method == DENSE or not METHODS[method].weighted or not sources:
            return None
        return ",".join(map(text_fingerprint, sources))

    def data_digest(self, task: Task) -> str | None:
        """Return a hash of a task's files of local data; None for data of the hub."""
        directory = self._directory(task)
        return None if directory is None else files_fingerprint(task.files(directory))

    @staticmethod
    def code_digest(task: Task, method: str) -> dict[str, str]:
        """Return hashes of the code of a method, and of the modules that train and score a task."""
        parts = (type(task), Task, read_file, train_and_score)
        modules = {__name__, *(part.__module__ for part in parts)}
        digest = {"training": code_hash(*sorted(modules), follow=False)}
        if method != DENSE:
            digest["method"] = method_code(method)
            if METHODS[method].weighted:
                digest["frequencies"] = frequencies_code()
        return digest

    # ---- what cells start from

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, which has a padding token."""
        tokenizer = load_tokenizer(self.name)
        if tokenizer is None and not Path(self.name).is_dir():
            raise FileNotFoundError(f"model: {self.name!r} is neither a local directory nor on the hub")
        if tokenizer is None or tokenizer.pad_token is None:
            raise ValueError(f"tokenizer: expected one with a padding token beside the model {self.name}")
        return tokenizer

    def prepared(self, task: Task, settings: CellSettings) -> Prepared:
        """Return a task's tokenised records."""
        key = (task.name, settings.training)
        if self._prepared is None or self._prepared[0] != key:
            limits = (settings.max_train_samples, *[settings.max_eval_samples] * (len(task.splits) - 1))
            splits = [
                _first(task.read_split(split, self._directory(task)), limit)
                for split, limit in zip(task.splits, limits, strict=True)
            ]
            self._prepared = (key, task.prepare(splits, self.tokenizer, settings.training))
        return self._prepared[1]

    def model(self, task: Task, settings: CellSettings) -> tuple[transformers.PreTrainedModel, int]:
        """Return the model that a cell starts from, and the bytes of its dense table."""
        transformers.set_seed(settings.seed)  # draws the new head
        model = task.load_model(self.name)
        length, longest = settings.training.max_length, longest_input(model)
        if length > longest:
            raise ValueError(f"max_length: expected at most the model's {longest}, got {length}")
        table = find_table(model)
        dense_bytes = table.weight.nbytes
        if settings.method != DENSE:
            recipe = Recipe.parse(method=settings.method, ratio=settings.ratio)
            if recipe.method not in self._tables:
                check_installable(table, recipe)
                weight = table.weight.detach()
                self._tables[recipe.method] = recipe.factorize(weight, self._frequencies(len(weight)))
            install(model, table, copy.deepcopy(self._tables[recipe.method]), recipe)  # the cell trains it
        freeze_table(model, settings.freeze)
        return model, dense_bytes

    def _directory(self, task: Task) -> Path | None:
        if self._data is None:
            return None
        own = self._data / task.name
        return own if own.is_dir() else self._data

    def _frequencies(self, num_embeddings: int) -> torch.Tensor:
        return token_frequencies(num_embeddings, self._counts, self._count_text, self.tokenizer)[0]


def _first(records: Any, limit: int | None) -> Any:
    return records if limit is None else records.select(range(min(limit, len(records))))

"""Fine-tune and score: the dense model, and compressed ones, on the tasks of GLUE and on SQuAD.

A study is a grid of cells, one per task, method and seed. Every cell starts from the same pretrained model
and the same new head (drawn with the seed), has its token embeddings compressed by its method, is trained
under the same rule of what is fixed (``freeze``), and is scored on the task's validation set.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
import shutil
import statistics
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

from .._version import __version__
from ..io.atomic import alone_in, check_writable_directory, replacing
from ..io.checked_json import read_checked_json, to_checked_json
from ..methods import METHODS
from ..methods.base import parse_options
from ..models.checkpoint import stored_table
from ..models.find_table import find_table, input_embeddings
from ..models.loading import load_tokenizer
from ..models.quantizer import install
from ..models.report import public_name
from ..models.saving import save
from ..models.swap import check_installable
from ..nn.base import CompressedEmbedding
from ..recipe import Recipe
from ..tables import Table
from ..text.frequencies import token_frequencies
from .perplexity import longest_input
from .tasks import Prepared, Task, Training, quiet_libraries, require
from .training import Freeze, freeze_table, remove_checkpoints, train_and_score

DENSE = "dense"
DEFAULT_METHODS = (DENSE, "svd", "autoencoder", "allocate")
RESULT_NAME = "result.json"


class Settings(BaseModel):
    """All that a cell's scores depend on, but for versions and the machine."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(description="a hub name, or a directory's last part")
    model_digest: str = Field(description="of the directory's files, or of the hub name")
    data_digest: str | None = Field(description="of the files of local data; null for the hub's")
    counts_digest: str | None = Field(description="of where token frequencies come from, if the method asks")
    task: str
    method: str
    ratio: float | None = Field(description="asked for; null for the dense model")
    freeze: Freeze
    seed: int
    training: Training
    max_train_samples: int | None
    max_eval_samples: int | None

    @property
    def folder(self) -> Path:
        """Where the cell is kept in the study's directory: cells of other settings are in another place."""
        digest = hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]
        return Path(self.task) / f"{self.method}-seed{self.seed}-{digest}"


class Cell(BaseModel):
    """A finished cell, as its file holds it."""

    settings: Settings
    scores: dict[str, float] = Field(description="times 100, by metric, on the validation set")
    table_bytes: int = Field(description="of the token embeddings, as stored")
    ratio: float = Field(description="bytes of the dense table over table_bytes")
    trained_parameters: int
    train_records: int
    eval_records: int
    steps: int
    seconds: float = Field(description="of training; of a cell that was interrupted, since it went on")
    versions: dict[str, str]
    command: str | None = Field(default=None, description="that ran the cell")


class Score(BaseModel):
    """A metric of a task and a method, over the seeds."""

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
    """The result of a study."""

    model: str
    freeze: Freeze
    seeds: list[int]
    scores: list[Score]
    cells: list[Cell]


def fine_tune(
    model: str | os.PathLike,
    tasks: Sequence[Task],
    *,
    output: str | os.PathLike,
    methods: Sequence[str] = DEFAULT_METHODS,
    ratio: float = 5.0,
    seeds: Sequence[int] = (22,),
    freeze: Freeze = "codes",
    data: str | os.PathLike | None = None,
    counts: str | os.PathLike | None = None,
    count_text: str | os.PathLike | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    eval_batch_size: int = 32,
    save_steps: int = 500,
    keep_models: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
    command: str | None = None,
    **training: Any,
) -> FineTuned:
    """Fine-tune a model, dense and compressed, on some tasks, and score it.

    A finished cell is kept in ``output`` with all of its settings, and not run again. An interrupted one goes
    on from its last checkpoint; on a CPU it ends with the scores of an uninterrupted run, and the same seed
    gives the same scores. A model or data set on the hub is known by its name alone: where it changed,
    ``overwrite`` runs the cells again.

    What is trained of the token embeddings, by ``freeze``, alike for every method:

    - ``none``: all that can be; codes of a packed table are whole numbers and cannot.
    - ``codes``: what a token has for itself is fixed (the dense table; codes of factors; codes and scales of
      a packed table), what all tokens share is trained (basis and offset).
    - ``table``: nothing.

    The authors of the paper differ by method: of the autoencoder the codes are fixed and the decoder is
    trained (``codes``), of the SVD both factors are fixed (``table``), and the dense model is trained whole
    (``none``).

    Scored is what is stored: what was trained of a packed table is rounded to the 16 bits it has on disk. The
    model is trained in fp32, and the ratio counts from its table in fp32.

    Args:
        model: a dense pretrained model, a directory or a name on the hub.
        tasks: of ``embkern.evaluate.GLUE``, or ``embkern.evaluate.SQUAD``.
        output: directory of the study.
        methods: ``dense``, and methods that a model can hold.
        ratio: bytes of the table over bytes of what replaces it.
        seeds: of the head, of the order of records and of dropout. Methods have a seed of their own, so that
            the spread is that of fine-tuning.
        freeze: see above.
        data: directory of local data in place of the hub's: ``train`` and ``validation`` (of MNLI
            ``validation_matched`` and ``validation_mismatched``) with the same columns, as ``.jsonl``,
            ``.csv`` or ``.parquet``, of SQuAD also its own JSON; in a folder with the task's name, if there
            is one.
        counts: token frequencies for methods that weigh rows: a file of ``embkern count``.
        count_text: text to count them in: a file, a directory or a data set.
        max_train_samples: take the first so many records to train on, for a trial.
        max_eval_samples: take the first so many records of each split that is scored.
        eval_batch_size: of scoring.
        save_steps: steps between two checkpoints.
        keep_models: save the model of each cell that is run, in ``model`` of its directory.
        overwrite: run finished cells again.
        command: of the command line, kept with the cells that it ran.
        progress: show bars on stderr; None shows them on a terminal.
        training: fields of ``Training`` in place of the tasks' own, such as ``epochs=1``.

    Raises:
        ValueError: an argument, the model, its tokenizer or the data is not usable; it names what.
        FileNotFoundError: the model or the data cannot be had.
        OSError: ``output`` cannot be written, or another process is at one of its cells.
        ImportError: datasets, accelerate or scikit-learn is not installed.
    """
    _check_names(methods, ratio, seeds, freeze)
    _check_numbers(tasks=len(tasks), methods=len(methods), seeds=len(seeds), save_steps=save_steps,
                   eval_batch_size=eval_batch_size, max_train_samples=max_train_samples,
                   max_eval_samples=max_eval_samples)  # fmt: skip
    for module in ("datasets", "accelerate", "sklearn"):
        require(module)
    check_writable_directory(output, "output")
    source = _Source(os.fspath(model), data, counts, count_text)
    grid = [
        Settings(
            model=public_name(source.name),
            model_digest=source.model_digest,
            data_digest=source.data_digest(task),
            counts_digest=source.counts_digest if method != DENSE and METHODS[method].weighted else None,
            task=task.name,
            method=method,
            ratio=None if method == DENSE else ratio,
            freeze=freeze,
            seed=seed,
            training=parse_options(Training, {**task.training.model_dump(), **training}, "training"),
            max_train_samples=max_train_samples,
            max_eval_samples=max_eval_samples,
        )
        for task, method, seed in itertools.product(tasks, methods, seeds)
    ]
    by_name = {task.name: task for task in tasks}
    quiet = None if progress is None else not progress  # tqdm's None: quiet where stderr is no terminal
    cells = []
    with quiet_libraries(), tqdm(grid, desc="cells", unit="cell", disable=quiet) as bar:
        for settings in bar:
            bar.set_postfix_str(f"{settings.task} {settings.method} seed {settings.seed}")
            folder = Path(output) / settings.folder
            if overwrite and folder.exists():
                with alone_in(folder, "output"):
                    shutil.rmtree(folder)
            cell = read_cell(folder)
            if cell is None:
                task = by_name[settings.task]
                options = {"eval_batch_size": eval_batch_size, "save_steps": save_steps, "quiet": quiet}
                cell = _run(source, task, settings, folder, keep_models, command, **options)
            elif any(folder.glob("checkpoint-*")):  # killed before they were removed
                with alone_in(folder, "output"):
                    remove_checkpoints(folder)
            cells.append(cell)
    return FineTuned(
        model=public_name(source.name),
        freeze=freeze,
        seeds=list(seeds),
        scores=summarize(cells),
        cells=cells,
    )


def _check_names(methods: Sequence[str], ratio: float, seeds: Sequence[int], freeze: str) -> None:
    known = [DENSE, *METHODS]
    if unknown := [method for method in methods if method not in known]:
        raise ValueError(f"methods: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    for method in methods:
        if method != DENSE:
            Recipe.parse(method=method, ratio=ratio)
    for name, values in (("methods", methods), ("seeds", seeds)):
        if len(set(values)) < len(values):
            raise ValueError(f"{name}: expected each once, got {', '.join(map(str, values))}")
    if freeze not in get_args(Freeze):
        raise ValueError(f"freeze: expected one of {', '.join(get_args(Freeze))}, got {freeze!r}")


def _check_numbers(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


# ---- what cells share ------------------------------------------------------------------------------------


class _Source:
    """The pretrained model, its tokenizer, compressed tables and tokenised data, each made once if needed."""

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
        self._prepared: tuple[Any, Prepared] | None = None  # of the last task: data sets are large

    def _directory(self, task: Task) -> Path | None:
        if self._data is None:
            return None
        own = self._data / task.name
        return own if own.is_dir() else self._data

    @cached_property
    def model_digest(self) -> str:
        path = Path(self.name)
        return _digest(*sorted(filter(Path.is_file, path.iterdir()))) if path.is_dir() else _digest(path)

    @cached_property
    def counts_digest(self) -> str:
        return _digest(*(each for each in (self._counts, self._count_text) if each is not None))

    def data_digest(self, task: Task) -> str | None:
        directory = self._directory(task)
        return None if directory is None else _digest(*task.files(directory))

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.name)
        if tokenizer is None and not Path(self.name).is_dir():
            raise FileNotFoundError(
                f"model: {self.name!r} is neither a directory here nor to be had from the hub"
            )
        if tokenizer is None or tokenizer.pad_token is None:
            raise ValueError(f"tokenizer: expected one with a padding token beside the model {self.name}")
        return tokenizer

    def prepared(self, task: Task, settings: Settings) -> Prepared:
        """Return the task's records, tokenised."""
        key = (task.name, settings.training)
        if self._prepared is None or self._prepared[0] != key:
            limits = (settings.max_train_samples, *[settings.max_eval_samples] * (len(task.splits) - 1))
            splits = [
                _first(task.read_split(split, self._directory(task)), limit)
                for split, limit in zip(task.splits, limits, strict=True)
            ]
            self._prepared = (key, task.prepare(splits, self.tokenizer, settings.training))
        return self._prepared[1]

    def model(self, task: Task, settings: Settings) -> tuple[transformers.PreTrainedModel, int]:
        """Return the model that a cell starts from, and the bytes of its dense table."""
        transformers.set_seed(settings.seed)  # the new head's
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

    def _frequencies(self, num_embeddings: int) -> torch.Tensor:
        return token_frequencies(num_embeddings, self._counts, self._count_text, self.tokenizer)[0]


def _first(records: Any, limit: int | None) -> Any:
    return records if limit is None else records.select(range(min(limit, len(records))))


def _digest(*sources: str | os.PathLike) -> str:
    """Digest of files, of all files in directories, and of names that are neither."""
    digest = hashlib.sha256()
    for source in map(Path, sources):
        files = sorted(source.rglob("*")) if source.is_dir() else [source]
        for path in files:
            if path.is_file():
                with open(path, "rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
            elif not path.exists():
                digest.update(str(path).encode())
    return digest.hexdigest()[:12]


# ---- cells -----------------------------------------------------------------------------------------------


def _run(
    source: _Source,
    task: Task,
    settings: Settings,
    folder: Path,
    keep_models: bool,
    command: str | None,
    **options: Any,
) -> Cell:
    prepared = source.prepared(task, settings)
    model, dense_bytes = source.model(task, settings)
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder, "output"):
        done = train_and_score(
            model,
            prepared,
            source.tokenizer,
            settings.training,
            folder,
            seed=settings.seed,
            **options,
        )
        compressed = isinstance(input_embeddings(model), CompressedEmbedding)
        table_bytes = stored_table(model).nbytes if compressed else dense_bytes
        if keep_models:
            save(model, folder / "model", tokenizer=source.tokenizer)
        cell = Cell(
            settings=settings,
            scores=done.scores,
            table_bytes=table_bytes,
            ratio=dense_bytes / table_bytes,
            trained_parameters=sum(each.numel() for each in model.parameters() if each.requires_grad),
            train_records=prepared.train_records,
            eval_records=prepared.eval_records,
            steps=done.steps,
            seconds=done.seconds,
            versions={
                "embkern": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            command=command,
        )
        with replacing(folder / RESULT_NAME) as path:
            path.write_text(to_checked_json(cell, indent=2), encoding="utf-8")
        remove_checkpoints(folder)
    return cell


def read_cell(folder: Path) -> Cell | None:
    """Return the finished cell in a folder, None if there is none.

    Raises:
        ValueError: its file is damaged.
    """
    path = folder / RESULT_NAME
    if not path.is_file():
        return None
    try:
        return Cell.model_validate(read_checked_json(path))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged; overwrite (--overwrite) runs the cell again: {error}"
        ) from error


def summarize(cells: Sequence[Cell]) -> list[Score]:
    """Return mean and spread over the seeds, per task, metric and method, in the order of the cells."""
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

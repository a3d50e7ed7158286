"""Fine-tune and score a dense model and compressed ones on the tasks of GLUE and on SQuAD.

A study is a grid of cells, one per task, method and seed. Every cell starts from the same pretrained model
with a new head, drawn with the seed. The cell's method compresses the token embeddings, ``freeze`` chooses
which of their parameters are fixed, and the trained model is scored on the task's validation set.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from tqdm import tqdm

from .._version import __version__
from ..experiments.engine import read_result, write_result
from ..io.atomic import alone_in, check_writable_directory
from ..io.optional import require
from ..methods import METHODS
from ..methods.base import parse_options
from ..models.checkpoint import stored_table
from ..models.find_table import input_embeddings
from ..models.report import public_name
from ..models.saving import save
from ..nn.base import CompressedEmbedding
from ..recipe import Recipe
from .cells import RESULT_NAME, Cell, CellSettings, FineTuned, summarize
from .libraries import quiet_libraries
from .pretrained import DENSE, Pretrained
from .tasks import Task, Training
from .trainer import Freeze, remove_checkpoints, train_and_score

DEFAULT_METHODS = (DENSE, "svd", "autoencoder", "allocate")


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
    """Fine-tune a model, dense and compressed, on tasks, and score it.

    A finished cell is stored in ``output`` with all of its settings, and runs again only if one of them has
    changed: the model, the data, an option, the code of the method or the code that trains. The
    documentation lists them under "What a result depends on". An interrupted cell resumes from its last
    checkpoint; on a CPU it ends with the scores of an uninterrupted run, and the same seed gives the same
    scores. A model or data set on the hub is identified by its name alone: after it changed, use
    ``overwrite``.

    ``freeze`` fixes parameters of the token embeddings in the same way for every method:

    - ``none``: all parameters are trained, except the codes of a packed table, which are integers.
    - ``codes``: parameters of single tokens are fixed (the dense table; codes of factors; codes and scales of
      a packed table), parameters that all tokens share are trained (basis and offset).
    - ``table``: all parameters are fixed.

    The paper's authors choose by method: for the autoencoder the codes are fixed and the decoder is trained
    (``codes``), for the SVD both factors are fixed (``table``), and the dense model is trained as a whole
    (``none``).

    The scored model is the stored one: trained parameters of a packed table are rounded to the 16 bits that
    they have on disk. Training is in fp32, and the ratio is relative to the fp32 table.

    Args:
        model: a dense pretrained model, a directory or a name on the hub.
        tasks: values of ``embkern.evaluate.GLUE``, or ``embkern.evaluate.SQUAD``.
        output: directory of the study.
        methods: ``dense``, and methods whose result a model can hold.
        ratio: bytes of the table over bytes of what replaces it.
        seeds: random seeds of the head, of the order of records and of dropout. The methods' own seed is
            constant, so that the spread is that of fine-tuning.
        freeze: see above.
        data: directory of local data in place of the hub's: ``train`` and ``validation`` (for MNLI
            ``validation_matched`` and ``validation_mismatched``) with the same columns, as ``.jsonl``,
            ``.csv`` or ``.parquet``, for SQuAD also its own JSON; in a folder with the task's name, if there
            is one.
        counts: token frequencies for methods that weight rows: a file of ``embkern count``.
        count_text: text to count them in: a file, a directory or a data set.
        max_train_samples: train on this number of records at most, for a trial.
        max_eval_samples: score this number of records of each split at most.
        eval_batch_size: batch size of scoring.
        save_steps: steps between two checkpoints.
        keep_models: save the model of each cell that runs, in ``model`` of its folder.
        overwrite: run finished cells again.
        command: command line to record in the cells that run.
        progress: show bars on stderr; None shows them on a terminal.
        training: fields of ``Training`` that replace the tasks' own, such as ``epochs=1``.

    Raises:
        ValueError: an argument, the model, its tokenizer or the data is not usable; it names what.
        FileNotFoundError: the model or the data does not exist.
        OSError: ``output`` cannot be written, or another process runs one of its cells.
        ImportError: datasets, accelerate or scikit-learn is not installed.
    """
    _check_names(methods, ratio, seeds, freeze)
    _check_numbers(tasks=len(tasks), methods=len(methods), seeds=len(seeds), save_steps=save_steps,
                   eval_batch_size=eval_batch_size, max_train_samples=max_train_samples,
                   max_eval_samples=max_eval_samples)  # fmt: skip
    for module in ("datasets", "accelerate", "sklearn"):
        require(module)
    check_writable_directory(output, "output")
    source = Pretrained(os.fspath(model), data, counts, count_text)
    grid = [
        CellSettings(
            model=public_name(source.name),
            model_digest=source.model_digest,
            data_digest=source.data_digest(task),
            counts_digest=source.counts_digest(method),
            code_digest=source.code_digest(task, method),
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
    quiet = None if progress is None else not progress  # tqdm takes None as: quiet unless on a terminal
    cells = []
    with quiet_libraries(), tqdm(grid, desc="cells", unit="cell", disable=quiet) as bar:
        for settings in bar:
            bar.set_postfix_str(f"{settings.task} {settings.method} seed {settings.seed}")
            folder = Path(output) / settings.folder
            if overwrite and folder.exists():
                with alone_in(folder, "output"):
                    shutil.rmtree(folder)
            cell = read_result(folder / RESULT_NAME, Cell, settings.dependencies)
            if cell is None:
                task = by_name[settings.task]
                options = {"eval_batch_size": eval_batch_size, "save_steps": save_steps, "quiet": quiet}
                cell = _run_cell(source, task, settings, folder, keep_models, command, **options)
            elif any(folder.glob("checkpoint-*")):  # the process was killed before it removed them
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


def _run_cell(
    source: Pretrained,
    task: Task,
    settings: CellSettings,
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
        write_result(folder / RESULT_NAME, cell)
        remove_checkpoints(folder)
    return cell

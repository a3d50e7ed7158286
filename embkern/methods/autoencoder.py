"""The paper's autoencoder: one linear encoder, one linear decoder, a loss that cares about direction."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from ..factors import Factors
from ..files import check_writable, replacing
from ..layer import check_rank
from ..tensor_file import TensorFormat
from .base import (
    Options,
    Rows,
    block_rows,
    check_shape,
    not_finite,
    parse_options,
    refuse_rows,
    seeded,
    table_checksum,
    take,
    training_dtype,
    wide_blocks,
)
from .engines import ENGINES, select_engine
from .graph import GRAPH_STEPS
from .sharded import SummedSteps, World
from .steps import Objective, Weights
from .svd import gram, principal_vectors

FORMAT = TensorFormat(
    "embkern.autoencoder/3",
    "a checkpoint",
    required=("parameters", "first_moment", "second_moment", "best"),
    settings=("identity", "step", "epoch", "best_score", "history"),
)
CHUNK_SECONDS = 0.1  # of steps between two looks at the progress bar and at Ctrl-C
LARGEST_BATCH = {"cpu": 1, "cuda": 8}  # in blocks of rows; a larger batch is summed block by block
KEPT = ("epoch", "loss", "direction_error", "rmse")  # of the best epoch, in the facts of the result

_log = logging.getLogger(__name__)


class AutoencoderOptions(Options):
    """Options of ``autoencoder``; the defaults are the recipe that the paper's authors ship."""

    activation: Literal["elu"] | None = Field(None, description="elu: one after the encoder and the decoder")
    init: Literal["random", "svd"] = Field(
        "random", description="start from nn.Linear's init or from the SVD"
    )
    cosine_weight: float = Field(0.9975 / 5, ge=0, description="of mean(1 - cos); the authors divide by 5")
    mse_weight: float = Field(0.0, ge=0, description="of mean((x - y)^2)")
    rmse_weight: float = Field(0.0, ge=0, description="of sqrt(mean((x - y)^2)), the root taken per batch")
    power_weight: float = Field(0.0025, ge=0, description="of mean((|x - y| + 1e-10)^alpha)")
    alpha_start: float = Field(1.0, gt=0, description="alpha in the first epoch")
    alpha_end: float = Field(0.1, gt=0, description="alpha after alpha_epochs")
    alpha_epochs: int = Field(20, ge=1, description="epochs over which alpha falls linearly")
    eps: float = Field(1e-6, gt=0, description="lower bound of |x||y| in the cosine")
    lr: float = Field(1e-3, gt=0, description="Adam's learning rate")
    lr_step: int = Field(4, ge=1, description="epochs between two steps of the learning rate")
    lr_gamma: float = Field(0.5, gt=0, le=1, description="factor of each step")
    batch_size: int = Field(32, ge=1, description="rows per step")
    epochs: int = Field(30, ge=1, description="passes over the table")
    seed: int = Field(1, ge=0, lt=2**32, description="of the initial weights and the order of rows")

    def alpha(self, epoch: int) -> float:
        """Exponent of the power term in an epoch, counted from 0."""
        return self.alpha_start + (self.alpha_end - self.alpha_start) * min(1.0, epoch / self.alpha_epochs)

    def learning_rate(self, epoch: int) -> float:
        """Learning rate in an epoch, counted from 0 (``StepLR``)."""
        return self.lr * self.lr_gamma ** (epoch // self.lr_step)


@dataclass
class _Run:
    """Where a run stands after a whole epoch; everything that a resumed run needs."""

    weights: Weights
    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_score: float = float("inf")
    best: Tensor | None = None

    def save(self, path: str | os.PathLike, identity: dict[str, Any]) -> None:
        """Write a checkpoint."""
        assert self.best is not None, "an epoch was the best so far"
        state = self.weights.state()
        step = state.pop("step")
        FORMAT.save(
            path,
            {**state, "best": self.best},
            identity=identity,
            step=step,
            epoch=self.epoch,
            best_score=self.best_score,
            history=self.history,
        )

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what ``_read`` returned."""
        self.weights.load(state)
        self.epoch, self.history = state["epoch"], state["history"]
        self.best_score = state["best_score"]
        self.best = state["best"].to(self.weights.parameters.device)


def autoencoder(
    table: Rows,
    rank: int,
    *,
    validate: Callable[[Factors], float] | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_seconds: float = 5.0,
    log: str | os.PathLike | None = None,
    progress: bool | None = None,
    engine: str | None = None,
    world: World | None = None,
    **options: Any,
) -> Factors:
    """Train the paper's autoencoder on the rows of a table and keep its codes and decoder.

    ``y = decoder(encoder(x))``, both ``nn.Linear`` with bias, trained with Adam on::

        cosine_weight * (1 - F.cosine_similarity(x, y)).mean() + mse_weight * F.mse_loss(y, x)
        + rmse_weight * F.mse_loss(y, x).sqrt() + power_weight * ((x - y).abs() + 1e-10).pow(alpha).mean()

    The defaults are the authors' recipe: 30 epochs of batch 32, alpha falling from 1 to 0.1 over 20 epochs.
    Training runs in fp32 (float64 for a float64 table) on the table's device. The order of rows depends on
    the seed and the epoch alone, so a resumed run ends with the weights of an uninterrupted one. With
    ``batch_size >= V`` every epoch is one step on the whole table. The gradient of a batch beyond 8192 rows
    (65536 on CUDA; fewer for rows wider than 1024) is summed in blocks of 8192 rows, so that its memory
    beyond the table is some copies of the weights and one block. A ``TableFile`` is read block by block and
    gives the same bits as its rows in memory on the same device.

    Args:
        table: (V, H), in memory or a ``TableFile``.
        rank: r, 1 to H.
        validate: score of the factors after an epoch, lower is better; the best epoch is kept. By default
            the loss over the whole table, with alpha at ``alpha_end`` so that epochs compare.
        checkpoint: file that is replaced after an epoch; if it exists, the run goes on from it (with the
            same ``validate``: its scores so far are kept).
        checkpoint_seconds: least time between two checkpoints, for epochs shorter than that; the last epoch
            is always kept.
        log: file of JSON lines, one per epoch: epoch, loss, direction_error, rmse, alpha, lr, score, seconds.
            It is written as often as the checkpoint.
        progress: show a bar on stderr; None shows it on a terminal.
        engine: what takes the steps: ``native`` (C++ on the CPU, linear only), ``graph`` (a CUDA graph) or
            ``torch``; None takes the first that can serve. Engines differ in rounding.
        world: the processes and shards of a run on several, see ``embkern.methods.sharded``.
        options: the fields of ``AutoencoderOptions``.

    Returns:
        Factors in the table's dtype, with an offset, of the best epoch; ``facts`` has its number, loss,
        direction error and RMSE.

    Raises:
        ValueError, TypeError: the rank or an option is out of range, the table is not usable, or the
            checkpoint belongs to another run or is damaged, or ``validate`` returns no finite number.
        FileNotFoundError: the directory of ``checkpoint`` or ``log`` does not exist.
        OSError: one of them cannot be written; found before training where the directory shows it, and
            after an epoch where the disk is full. What was there is whole.
        RuntimeError: the loss is no longer finite, or the engine asked for cannot serve.

    Source: arXiv 2106.08181, section 3, and its authors' released configuration.
    """
    chosen = parse_options(AutoencoderOptions, options, "autoencoder")
    check_shape(table)
    check_rank(rank, table.shape[1])
    if not checkpoint_seconds >= 0:
        raise ValueError(f"checkpoint_seconds: expected at least 0, got {checkpoint_seconds}")
    world = world or World()
    world.on_first(lambda: _check_places(checkpoint=checkpoint, log=log))
    # Training must not depend on the modes of whoever calls: no_grad, inference, autocast, a default device.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(table.device.type, enabled=False),
        torch.device(table.device),
    ):
        if isinstance(table, Tensor):
            # Inference tensors cannot be saved for a backward; only those are worth a copy of the table.
            table = table.clone() if table.is_inference() else table.detach()
        trainer = _Trainer(table, rank, chosen, engine, world, progress)
        return trainer.train(validate, _Files(checkpoint, log, checkpoint_seconds))


def _check_places(**files: str | os.PathLike | None) -> None:
    for name, path in files.items():
        if path is not None:
            check_writable(path, name)


class _Files:
    """The checkpoint and the log of a run, written after an epoch unless they were a moment ago."""

    def __init__(
        self, checkpoint: str | os.PathLike | None, log: str | os.PathLike | None, seconds: float
    ) -> None:
        self.checkpoint, self.log, self.seconds = checkpoint, log, seconds
        self.identity: dict[str, Any] = {}
        self.written = time.monotonic()
        self.epoch = 0  # of the checkpoint

    def resume(self, identity: dict[str, Any], epochs: int, weights: Weights) -> dict[str, Any] | None:
        """Return the state of the run to go on with, for weights like these; None if there is none."""
        self.identity = identity
        if self.checkpoint is None or not Path(self.checkpoint).exists():
            return None
        state = _read(self.checkpoint, identity, epochs, weights)
        self.epoch = state["epoch"]
        return state

    def keep(self, run: _Run, *, last: bool) -> int:
        """Write both, if it is time; return the epoch that the checkpoint holds."""
        if last or time.monotonic() - self.written >= self.seconds:
            if self.checkpoint is not None:
                run.save(self.checkpoint, self.identity)
                self.epoch = run.epoch
            self.keep_log(run)
            self.written = time.monotonic()
        return self.epoch

    def keep_log(self, run: _Run) -> None:
        """Write the log."""
        if self.log is not None:
            with replacing(self.log) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in run.history))

    def told(self, epoch: int, epochs: int, *, first: bool) -> str:
        """What to tell of the checkpoint when a run is lost."""
        if self.checkpoint is None:
            return "no checkpoint was named, so nothing is kept"
        holds = f"epoch {epoch} of {epochs}" if epoch else "no epoch yet"
        # The first process may have written once more, and been lost before it could say so.
        return f"{self.checkpoint} holds {holds}{'' if first else ', or more'}: run the same command again"


class _Trainer:
    """The epoch loop, and what goes over the whole table: by blocks, and by the shards of this process."""

    def __init__(
        self,
        table: Rows,
        rank: int,
        options: AutoencoderOptions,
        engine: str | None,
        world: World,
        progress: bool | None,
    ) -> None:
        self.table, self.options, self.world = table, options, world
        self.progress = progress if world.rank == 0 else False
        bad = [row for rows in world.all(self._not_finite()) for row in rows]
        if bad:
            world.on_first(lambda: refuse_rows(bad))
        self.rows: Rows = table
        if isinstance(table, Tensor):
            self.rows = table.to(training_dtype(table)).contiguous()
        self.sections = world.sections(self.rows)
        self.objective = Objective(
            options.cosine_weight, options.mse_weight, options.rmse_weight, options.power_weight, options.eps
        )
        with seeded(options.seed, torch.device("cpu")):  # the same start on every device
            weights = Weights.random(rank, table.shape[1], options.activation)
        self.weights = weights.to(table.device, training_dtype(table))
        self.batch_size = min(options.batch_size, len(table))
        self.chunk_steps, self.most_steps = 1, len(table)  # taken at a time, and at most
        if engine is not None and world.shards > 1:
            raise ValueError(f"engine: expected None for a sharded table, got {engine!r}")
        self.take_steps = self._steps(select_engine(engine, self.weights))

    def _steps(self, engine: str) -> Callable[[Tensor, float, float], Tensor]:
        """Return what takes the steps of an order of rows with an alpha and a learning rate."""
        rows, size = self.rows, self.batch_size
        largest = block_rows(rows) * LARGEST_BATCH.get(rows.device.type, 1)
        if self.world.shards > 1 or size > largest:
            summed = SummedSteps(self.weights, self.objective, self.world)
            return lambda ids, alpha, lr: summed.run(self.sections, ids, size, alpha, lr)
        steps = ENGINES[engine](self.weights, self.objective)
        if isinstance(rows, Tensor):
            return lambda ids, alpha, lr: steps.run(rows, ids, size, alpha, lr)
        self.most_steps = max(1, block_rows(rows) // size)
        buffer = torch.empty(self.most_steps * size, rows.shape[1], dtype=training_dtype(rows))
        positions = torch.arange(len(buffer), device="cpu")

        def streamed(ids: Tensor, alpha: float, lr: float) -> Tensor:
            buffer[: len(ids)] = take(rows, ids)  # in one place: a captured graph knows its address
            return steps.run(buffer, positions[: len(ids)], size, alpha, lr)

        return streamed

    def train(self, validate: Callable[[Factors], float] | None, files: _Files) -> Factors:
        """Run the epochs that are left and return the factors of the best."""
        options, run = self.options, _Run(self.weights)
        identity = self._identity() if files.checkpoint is not None else {}
        state = self.world.on_first(lambda: files.resume(identity, options.epochs, self.weights))
        self._tell(files, state["epoch"] if state else 0)
        if state is not None:
            run.load(state)
            self.world.on_first(lambda: files.keep_log(run))  # a finished run writes it nowhere else
        elif options.init == "svd":
            self._start_at_svd()
        steps = -(-len(self.rows) // self.batch_size)
        bar = tqdm(
            total=options.epochs * steps,
            initial=run.epoch * steps,
            desc=f"autoencoder r={self.weights.rank}",
            unit="step",
            disable=None if self.progress is None else not self.progress,
        )
        try:
            with bar:
                while run.epoch < options.epochs:
                    self._next_epoch(run, validate, bar)
                    self._keep(run, files)
        except BaseException:
            if self.world.rank == 0:
                try:
                    files.keep_log(run)
                except OSError as error:  # what ended the run is the one to report
                    _log.warning("the log is not up to date: %s", error)
            raise
        assert run.best is not None
        self.weights.parameters.copy_(run.best)
        best = min(run.history, key=lambda entry: entry["score"])
        return dataclasses.replace(self._factors(), facts={name: best[name] for name in KEPT})

    def _next_epoch(self, run: _Run, validate: Callable[[Factors], float] | None, bar: tqdm) -> None:
        """Take an epoch's steps, and keep its weights if they are the best."""
        entry = self._epoch(run.epoch, validate, bar)
        self.world.agree(self.weights.parameters)
        run.history.append(entry)
        bar.set_postfix(loss=f"{entry['loss']:.4f}", direction=f"{entry['direction_error']:.4f}")
        if entry["score"] < run.best_score:
            run.best_score, run.best = entry["score"], self.weights.parameters.clone()
        run.epoch += 1

    def _keep(self, run: _Run, files: _Files) -> None:
        def keep() -> int:
            epoch = files.keep(run, last=run.epoch == self.options.epochs)
            self._tell(files, epoch)  # before the others hear of it: one of them may be gone
            return epoch

        epoch = self.world.on_first(keep)
        if self.world.rank:
            self._tell(files, epoch)

    def _tell(self, files: _Files, epoch: int) -> None:
        """Prepare what is to be said if another process is lost."""
        self.world.kept = files.told(epoch, self.options.epochs, first=self.world.rank == 0)

    def _epoch(self, epoch: int, validate: Callable[[Factors], float] | None, bar: tqdm) -> dict[str, Any]:
        """Take the steps of an epoch; return its line of the log."""
        options, started = self.options, time.perf_counter()
        alpha, lr = options.alpha(epoch), options.learning_rate(epoch)
        order, at = self._order(epoch), 0
        while at < len(order):
            began, count = time.perf_counter(), self.chunk_steps
            ids = order[at : at + count * self.batch_size]
            losses = self.take_steps(ids, alpha, lr)
            bar.update(len(losses))
            float(losses[-1])  # a device has caught up, too
            at += len(ids)
            pace = len(losses) * CHUNK_SECONDS / (time.perf_counter() - began)
            count = max(1, min(2 * count, int(pace), self.most_steps))
            self.chunk_steps = count - count % GRAPH_STEPS if count > GRAPH_STEPS else count
        entry = self._measure()
        score = entry["loss"]
        if validate is not None:
            score = self._validated(validate, epoch)
        seconds = round(time.perf_counter() - started, 3)
        return {**entry, "epoch": epoch, "alpha": alpha, "lr": lr, "score": score, "seconds": seconds}

    def _validated(self, validate: Callable[[Factors], float], epoch: int) -> float:
        factors = self._factors()

        def score() -> float:
            value = float(validate(factors))
            if not math.isfinite(value):
                raise ValueError(f"validate: expected a finite score in epoch {epoch}, got {value}")
            return value

        return self.world.on_first(score)

    def _order(self, epoch: int) -> Tensor:
        """Ids of an epoch; a step on the whole table needs no shuffle."""
        with torch.device("cpu"):
            if self.batch_size == len(self.rows):
                return torch.arange(len(self.rows))
            # A generator of its own for every epoch: no state to save, and the same order after a resume.
            generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + epoch)
            return torch.randperm(len(self.rows), generator=generator)

    def _measure(self) -> dict[str, Any]:
        """Loss with the final alpha, direction error and RMSE over the whole table."""
        sums = torch.zeros(len(self.sections), 3, dtype=torch.float64, device=self.rows.device)
        with self.world.one_thread(self.objective.by_blas(self.weights)):
            for total, section in zip(sums, self.sections, strict=True):
                for block in wide_blocks(section.rows):
                    total += self.objective.sums(self.weights, block, self.options.alpha_end)
        direction, squared, power = (self.world.sum(sums) / len(self.rows)).tolist()
        loss = self.objective.value(direction, squared, power)
        if not loss < float("inf"):
            self.world.on_first(lambda: self._diverged(loss))
        return {"loss": loss, "direction_error": direction, "rmse": squared**0.5}

    def _diverged(self, loss: float) -> None:
        lr = self.options.lr
        raise RuntimeError(f"autoencoder: the loss is {loss}; training diverged, lower lr ({lr:g})")

    def _factors(self) -> Factors:
        weights, dtype = self.weights, self.table.dtype
        codes = [torch.empty(len(section.rows), weights.rank, dtype=dtype) for section in self.sections]
        with self.world.one_thread():
            for part, section in zip(codes, self.sections, strict=True):
                at = 0
                for block in wide_blocks(section.rows):
                    part[at : at + len(block)] = weights.encode(block)
                    at += len(block)
        basis, offset = weights.basis.to(dtype, copy=True), weights.offset.to(dtype, copy=True)
        return Factors(self.world.collect(codes), basis, offset, weights.activation)

    def _start_at_svd(self) -> None:
        width = self.weights.width
        with self.world.one_thread():
            total = self.world.sum(gram(section.rows).view(-1) for section in self.sections).view(
                width, width
            )
            vectors = self.world.on_first(lambda: principal_vectors(total, self.weights.rank).cpu())
        self.weights.start_at(vectors.t())

    def _not_finite(self) -> list[int]:
        """Ids of the rows of this process with a NaN or an infinity."""
        sections = self.world.sections(self.table)
        return [row for section in sections for row in not_finite(section.rows, section.start)]

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that goes on from it."""
        checksums = [table_checksum(section.rows) for section in self.world.sections(self.table)]
        checksums = [each for checksums in self.world.all(checksums) for each in checksums]  # one per shard
        return {
            "table": [*checksums, str(self.table.dtype), *self.table.shape],
            "rank": self.weights.rank,
            "options": self.options.model_dump(exclude={"epochs"}),
        }


def _read(path: str | os.PathLike, identity: dict[str, Any], epochs: int, weights: Weights) -> dict[str, Any]:
    """Read a checkpoint of the run with this identity.

    Raises:
        ValueError: it is damaged, of another run, or of more epochs.
    """
    if Path(path).is_file() and zipfile.is_zipfile(path):  # it would wait at a named pipe
        raise ValueError(
            f"checkpoint: {path} is of an earlier version of embkern, without checksums; "
            "finish its run with that version, or delete it to start anew"
        )
    try:
        state = FORMAT.load(path, _state)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"checkpoint: {error}; delete it to start anew") from error
    saved = state["identity"]
    if saved != identity:
        different = [name for name in identity if saved.get(name) != identity[name]]
        raise ValueError(
            f"checkpoint: {path} belongs to another run (different {', '.join(different)}); "
            "delete it or name another file"
        )
    for name in FORMAT.required:
        got, expected = state[name], weights.parameters
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise ValueError(
                f"checkpoint: {path}: {name}: expected {expected.dtype} of shape {tuple(expected.shape)}, "
                f"got {got.dtype} of {tuple(got.shape)}"
            )
    if state["epoch"] > epochs:
        raise ValueError(f"epochs: expected at least the checkpoint's {state['epoch']}, got {epochs}")
    return state


def _state(tensors: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint holds, once it is what ``_Run.save`` may have written."""
    history, epoch, step = (settings[name] for name in ("history", "epoch", "step"))
    if type(epoch) is not int or type(step) is not int or min(epoch, step) < 1 or step > 2**53:
        raise ValueError(f"epoch, step: expected positive integers, got {epoch!r} and {step!r}")
    best = settings["best_score"]
    if type(best) is not float or not math.isfinite(best) or not isinstance(settings["identity"], dict):
        raise ValueError("best_score, identity: expected a finite float and a mapping")
    numbers = {"score", *KEPT}
    if (
        not isinstance(history, list)
        or len(history) != epoch
        or not all(
            isinstance(entry, dict) and all(type(entry.get(name)) in (int, float) for name in numbers)
            for entry in history
        )
    ):
        raise ValueError(f"history: expected {epoch} epochs, each with {', '.join(sorted(numbers))}")
    return {**tensors, **settings}

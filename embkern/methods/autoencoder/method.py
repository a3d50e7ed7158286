"""The paper's autoencoder: one linear encoder, one linear decoder, a loss that cares about direction."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from ...tables.factors import Factors, check_rank
from ..base import (
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
from ..sharded import World
from ..svd import gram, principal_vectors
from .checkpoint import KEPT, Run, RunFiles, check_places
from .engines import ENGINES, select_engine
from .graph import GRAPH_STEPS
from .steps import Objective, Weights
from .summed_steps import SummedSteps

CHUNK_SECONDS = 0.1  # of steps between two looks at the progress bar and at Ctrl-C


LARGEST_BATCH = {"cpu": 1, "cuda": 8}  # in blocks of rows; a larger batch is summed block by block


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
    world.on_first(lambda: check_places(checkpoint=checkpoint, log=log))
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
        return trainer.train(validate, RunFiles(checkpoint, log, checkpoint_seconds))


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

    def train(self, validate: Callable[[Factors], float] | None, files: RunFiles) -> Factors:
        """Run the epochs that are left and return the factors of the best."""
        options, run = self.options, Run(self.weights)
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

    def _next_epoch(self, run: Run, validate: Callable[[Factors], float] | None, bar: tqdm) -> None:
        """Take an epoch's steps, and keep its weights if they are the best."""
        entry = self._epoch(run.epoch, validate, bar)
        self.world.agree(self.weights.parameters)
        run.history.append(entry)
        bar.set_postfix(loss=f"{entry['loss']:.4f}", direction=f"{entry['direction_error']:.4f}")
        if entry["score"] < run.best_score:
            run.best_score, run.best = entry["score"], self.weights.parameters.clone()
        run.epoch += 1

    def _keep(self, run: Run, files: RunFiles) -> None:
        def keep() -> int:
            epoch = files.keep(run, last=run.epoch == self.options.epochs)
            self._tell(files, epoch)  # before the others hear of it: one of them may be gone
            return epoch

        epoch = self.world.on_first(keep)
        if self.world.rank:
            self._tell(files, epoch)

    def _tell(self, files: RunFiles, epoch: int) -> None:
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

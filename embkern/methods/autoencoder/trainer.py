"""The epoch loop of the autoencoder, and its passes over the whole table."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from ...tables.factors import Factors
from ..base import (
    Rows,
    block_rows,
    raise_for_rows,
    rows_not_finite,
    seeded,
    table_checksum,
    take_rows,
    training_dtype,
)
from ..sharded import World
from ..svd import gram, principal_vectors
from .checkpoint import BEST_EPOCH_FACTS, RunFiles, RunState
from .engines import ENGINES, select_engine
from .graph import GRAPH_STEPS
from .objective import Objective
from .options import AutoencoderOptions
from .summed_steps import SummedSteps
from .targets import Targets, TargetSection
from .weights import Weights

CHUNK_SECONDS = 0.1  # of steps between two updates of the progress bar and checks for Ctrl-C
LARGEST_BATCH = {"cpu": 1, "cuda": 8}  # in blocks of rows; the gradient of a larger batch is summed by blocks

_log = logging.getLogger(__name__)


class Trainer:
    """Runs the epochs; passes over the whole table go by blocks and by the shards of this process.

    Args:
        table: (V, H), detached, of a checked shape; its values are checked here.
        rank: r.
        options: the checked options.
        engine: the requested engine, or None.
        world: the processes and shards of the run.
        progress: whether to show a progress bar; None shows it only on a terminal.
    """

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
        bad = [row for rows in world.gather(self._rows_not_finite()) for row in rows]
        if bad:
            world.on_first(lambda: raise_for_rows(bad))
        self.rows: Rows = table
        if isinstance(table, Tensor):
            self.rows = table.to(training_dtype(table)).contiguous()
        with world.one_thread():
            self.sections = [TargetSection.of(section) for section in world.sections(self.rows)]
        self.objective = Objective(
            options.cosine_weight, options.mse_weight, options.rmse_weight, options.power_weight, options.eps
        )
        with seeded(options.seed, torch.device("cpu")):  # the same initial weights on every device
            weights = Weights.random(rank, table.shape[1], options.activation)
        self.weights = weights.to(table.device, training_dtype(table))
        self.batch_size = min(options.batch_size, len(table))
        self.chunk_steps = 1  # steps per call of take_steps; adapted to CHUNK_SECONDS
        self.max_chunk_steps = len(table)
        if engine is not None and world.shards > 1:
            raise ValueError(f"engine: expected None for a sharded table, got {engine!r}")
        self.take_steps = self._step_function(select_engine(engine, self.weights))

    def _step_function(self, engine: str) -> Callable[[Tensor, float, float], Tensor]:
        """Return the function that takes the steps of an order of ids with an alpha and a learning rate."""
        rows, size = self.rows, self.batch_size
        largest = block_rows(rows) * LARGEST_BATCH.get(rows.device.type, 1)
        if self.world.shards > 1 or size > largest:
            summed = SummedSteps(self.weights, self.objective, self.world)
            return lambda ids, alpha, lr: summed.run(self.sections, ids, size, alpha, lr)
        steps = ENGINES[engine](self.weights, self.objective)
        norms = self.sections[0].norms
        if isinstance(rows, Tensor):
            targets = Targets(rows, norms)
            return lambda ids, alpha, lr: steps.run(targets, ids, size, alpha, lr)
        self.max_chunk_steps = max(1, block_rows(rows) // size)
        most = self.max_chunk_steps * size
        # Reused, as a captured graph reads from their addresses.
        buffers = Targets(norms.new_empty(most, rows.shape[1]), norms.new_empty(most))
        positions = torch.arange(most, device="cpu")

        def streamed(ids: Tensor, alpha: float, lr: float) -> Tensor:
            buffers.rows[: len(ids)] = take_rows(rows, ids)
            buffers.norms[: len(ids)] = norms[ids.to(norms.device)]
            return steps.run(buffers, positions[: len(ids)], size, alpha, lr)

        return streamed

    def train(self, validate: Callable[[Factors], float] | None, files: RunFiles) -> Factors:
        """Run the remaining epochs and return the factors of the best epoch."""
        options, run = self.options, RunState(self.weights)
        identity = self._identity() if files.checkpoint is not None else {}
        state = self.world.on_first(lambda: files.resume(identity, options.epochs, self.weights))
        self._set_checkpoint_status(files, state["epoch"] if state else 0)
        if state is not None:
            run.load(state)
            # A run without remaining epochs writes the log nowhere else.
            self.world.on_first(lambda: files.write_log(run))
        elif options.init == "svd":
            self._initialise_by_svd()
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
                    self._save_if_due(run, files)
        except BaseException:
            if self.world.rank == 0:
                try:
                    files.write_log(run)
                except OSError as error:  # the error that ended the run is raised below
                    _log.warning("the log is not up to date: %s", error)
            raise
        assert run.best is not None
        self.weights.parameters.copy_(run.best)
        best = min(run.history, key=lambda entry: entry["score"])
        return dataclasses.replace(self._factors(), facts={name: best[name] for name in BEST_EPOCH_FACTS})

    def _next_epoch(self, run: RunState, validate: Callable[[Factors], float] | None, bar: tqdm) -> None:
        """Run an epoch and keep its weights if they are the best so far."""
        entry = self._epoch(run.epoch, validate, bar)
        self.world.check_equal_weights(self.weights.parameters)
        run.history.append(entry)
        bar.set_postfix(loss=f"{entry['loss']:.4f}", direction=f"{entry['direction_error']:.4f}")
        if entry["score"] < run.best_score:
            run.best_score, run.best = entry["score"], self.weights.parameters.clone()
        run.epoch += 1

    def _save_if_due(self, run: RunState, files: RunFiles) -> None:
        """Save the checkpoint and the log on the first process, and note their epoch on all processes."""

        def save() -> int:
            epoch = files.save_if_due(run, last=run.epoch == self.options.epochs)
            # Set before the broadcast of the epoch, which fails if another process is lost.
            self._set_checkpoint_status(files, epoch)
            return epoch

        epoch = self.world.on_first(save)
        if self.world.rank:
            self._set_checkpoint_status(files, epoch)

    def _set_checkpoint_status(self, files: RunFiles, epoch: int) -> None:
        self.world.checkpoint_status = files.status(epoch, self.options.epochs, first=self.world.rank == 0)

    def _epoch(self, epoch: int, validate: Callable[[Factors], float] | None, bar: tqdm) -> dict[str, Any]:
        """Take the steps of an epoch and return its entry of the log."""
        options, started = self.options, time.perf_counter()
        alpha, lr = options.alpha(epoch), options.learning_rate(epoch)
        order, done = self._order(epoch), 0
        while done < len(order):
            began, count = time.perf_counter(), self.chunk_steps
            ids = order[done : done + count * self.batch_size]
            losses = self.take_steps(ids, alpha, lr)
            bar.update(len(losses))
            float(losses[-1])  # waits for the device
            done += len(ids)
            pace = len(losses) * CHUNK_SECONDS / (time.perf_counter() - began)
            count = max(1, min(2 * count, int(pace), self.max_chunk_steps))
            self.chunk_steps = count - count % GRAPH_STEPS if count > GRAPH_STEPS else count
        entry = self._measure()
        score = entry["loss"]
        if validate is not None:
            score = self._validation_score(validate, epoch)
        seconds = round(time.perf_counter() - started, 3)
        return {**entry, "epoch": epoch, "alpha": alpha, "lr": lr, "score": score, "seconds": seconds}

    def _validation_score(self, validate: Callable[[Factors], float], epoch: int) -> float:
        """Call ``validate`` on the first process and return its score on all processes."""
        factors = self._factors()

        def score() -> float:
            value = float(validate(factors))
            if not math.isfinite(value):
                raise ValueError(f"validate: expected a finite score in epoch {epoch}, got {value}")
            return value

        return self.world.on_first(score)

    def _order(self, epoch: int) -> Tensor:
        """Return the ids of an epoch in the order of its steps, unshuffled for steps on the whole table."""
        with torch.device("cpu"):
            if self.batch_size == len(self.rows):
                return torch.arange(len(self.rows))
            # Every epoch has its own generator, so there is no generator state to save for resuming.
            generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + epoch)
            return torch.randperm(len(self.rows), generator=generator)

    def _measure(self) -> dict[str, Any]:
        """Return the loss with the final alpha, the direction error and the RMSE over the whole table."""
        sums = torch.zeros(len(self.sections), 3, dtype=torch.float64, device=self.rows.device)
        with self.world.one_thread(self.objective.computed_by_torch(self.weights)):
            for total, section in zip(sums, self.sections, strict=True):
                for block in section.blocks():
                    total += self.objective.term_sums(self.weights, block, self.options.alpha_end)
        direction, squared, power = (self.world.sum(sums) / len(self.rows)).tolist()
        loss = self.objective.value(direction, squared, power)
        if not loss < float("inf"):
            self.world.on_first(lambda: self._raise_diverged(loss))
        return {"loss": loss, "direction_error": direction, "rmse": squared**0.5}

    def _raise_diverged(self, loss: float) -> NoReturn:
        lr = self.options.lr
        raise RuntimeError(f"autoencoder: the loss is {loss}; training diverged, lower lr ({lr:g})")

    def _factors(self) -> Factors:
        """Return the factors of the current weights."""
        weights, dtype = self.weights, self.table.dtype
        codes = [torch.empty(len(section.rows), weights.rank, dtype=dtype) for section in self.sections]
        with self.world.one_thread():
            for part, section in zip(codes, self.sections, strict=True):
                first = 0
                for rows, _ in section.blocks():
                    part[first : first + len(rows)] = weights.encode(rows)
                    first += len(rows)
        basis, offset = weights.basis.to(dtype, copy=True), weights.offset.to(dtype, copy=True)
        return Factors(self.world.gather_rows(codes), basis, offset, weights.activation)

    def _initialise_by_svd(self) -> None:
        """Set the weights to the projection onto the r leading right singular vectors of the table."""
        width = self.weights.width
        with self.world.one_thread():
            total = self.world.sum(gram(section.rows).view(-1) for section in self.sections).view(
                width, width
            )
            vectors = self.world.on_first(lambda: principal_vectors(total, self.weights.rank).cpu())
        self.weights.set_projection(vectors.t())

    def _rows_not_finite(self) -> list[int]:
        """Return the ids of this process's rows with a NaN or an infinity."""
        sections = self.world.sections(self.table)
        return [row for section in sections for row in rows_not_finite(section.rows, section.start)]

    def _identity(self) -> dict[str, Any]:
        """Return what a checkpoint must have in common with a run that resumes from it."""
        checksums = [table_checksum(section.rows) for section in self.world.sections(self.table)]
        checksums = [
            each for checksums in self.world.gather(checksums) for each in checksums
        ]  # one per shard
        return {
            "table": [*checksums, str(self.table.dtype), *self.table.shape],
            "rank": self.weights.rank,
            "options": self.options.model_dump(exclude={"epochs"}),
        }

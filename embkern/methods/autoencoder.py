"""The paper's autoencoder: one linear encoder, one linear decoder, a loss that cares about direction."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from ..factors import Factors, activate, checksum
from ..files import replacing
from ..layer import check_rank
from ..ops import cosine_mse_loss, gather_project
from .base import Options, blocks, check_table, parse_options, seeded
from .svd import svd


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


class Autoencoder(nn.Module):
    """``decode(encode(x))``, with the decoder's weight stored as ``basis`` (r, H)."""

    positions: Tensor

    def __init__(self, embedding_dim: int, rank: int, activation: str | None = None) -> None:
        super().__init__()
        self.activation = activation
        self.encoder = nn.Linear(embedding_dim, rank)
        decoder = nn.Linear(rank, embedding_dim)
        self.basis = nn.Parameter(decoder.weight.detach().t().contiguous())
        self.offset = nn.Parameter(decoder.bias.detach())
        self.register_buffer("positions", torch.empty(0, dtype=torch.int64), persistent=False)

    def encode(self, rows: Tensor) -> Tensor:
        """Return the codes (N, r) of rows (N, H)."""
        return activate(self.encoder(rows), self.activation)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the reconstruction (N, H), through the function that inference uses."""
        if len(self.positions) < len(codes):
            self.positions = torch.arange(len(codes), device=codes.device)
        rows = gather_project(self.positions[: len(codes)], codes, self.basis, self.offset)
        return activate(rows, self.activation)

    @torch.no_grad()
    def init_from(self, factors: Factors) -> None:
        """Start at a linear factorisation with an orthonormal basis: the projection onto it."""
        self.encoder.weight.copy_(factors.basis)
        self.basis.copy_(factors.basis)
        self.encoder.bias.zero_()
        self.offset.zero_()


@dataclass
class _Run:
    """Where a run stands after a whole epoch; everything that a resumed run needs."""

    model: Autoencoder
    optimizer: torch.optim.Adam
    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_score: float = float("inf")
    best_weights: dict[str, Tensor] = field(default_factory=dict)


def autoencoder(
    table: Tensor,
    rank: int,
    *,
    validate: Callable[[Factors], float] | None = None,
    checkpoint: str | os.PathLike | None = None,
    log: str | os.PathLike | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Factors:
    """Train the paper's autoencoder on the rows of a table and keep its codes and decoder.

    ``y = decoder(encoder(x))``, both ``nn.Linear`` with bias, trained with Adam on::

        cosine_weight * (1 - F.cosine_similarity(x, y)).mean() + mse_weight * F.mse_loss(y, x)
        + rmse_weight * F.mse_loss(y, x).sqrt() + power_weight * ((x - y).abs() + 1e-10).pow(alpha).mean()

    The defaults are the authors' recipe: 30 epochs of batch 32, alpha falling from 1 to 0.1 over 20 epochs.
    Training runs in fp32 (float64 for a float64 table) on the table's device. The order of rows depends on
    the seed and the epoch alone, so a resumed run ends with the weights of an uninterrupted one.

    Args:
        table: (V, H).
        rank: r, 1 to H.
        validate: score of the factors after an epoch, lower is better; the best epoch is kept. By default
            the loss over the whole table, with alpha at ``alpha_end`` so that epochs compare.
        checkpoint: file that is replaced after every epoch; if it exists, the run goes on from it (with the
            same ``validate``: its scores so far are kept).
        log: file of JSON lines, one per epoch: epoch, loss, direction_error, rmse, alpha, lr, score, seconds.
        progress: show a bar on stderr; None shows it on a terminal.
        options: the fields of ``AutoencoderOptions``.

    Returns:
        Factors in the table's dtype, with an offset, of the best epoch.

    Raises:
        ValueError, TypeError: the rank or an option is out of range, the table is not usable, or the
            checkpoint belongs to another run or is damaged, or ``validate`` returns no finite number.
        FileNotFoundError: the directory of ``checkpoint`` or ``log`` does not exist.
        RuntimeError: the loss is no longer finite.

    Source: arXiv 2106.08181, section 3, and its authors' released configuration.
    """
    chosen = parse_options(AutoencoderOptions, options, "autoencoder")
    check_table(table)
    check_rank(rank, table.shape[1])
    for name, path in (("checkpoint", checkpoint), ("log", log)):
        if path is not None and not Path(path).resolve().parent.is_dir():
            raise FileNotFoundError(f"{name}: expected a file in a directory that exists, got {path}")
    # Training must not depend on the modes of whoever calls: no_grad, inference, autocast, a default device.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(table.device.type, enabled=False),
        torch.device(table.device),
    ):
        # Inference tensors cannot be saved for a backward; only those are worth a copy of the table.
        data = table.clone() if table.is_inference() else table.detach()
        return _train(data, rank, chosen, validate, checkpoint, log, progress)


def _train(
    table: Tensor,
    rank: int,
    chosen: AutoencoderOptions,
    validate: Callable[[Factors], float] | None,
    checkpoint: str | os.PathLike | None,
    log: str | os.PathLike | None,
    progress: bool | None,
) -> Factors:
    rows = table.to(torch.promote_types(table.dtype, torch.float32))
    run = _start(rows, rank, chosen)
    identity: dict[str, Any] = {}
    if checkpoint is not None:
        identity = {
            "table": [checksum(table), str(table.dtype), *table.shape],
            "rank": rank,
            "options": chosen.model_dump(exclude={"epochs"}),
        }
        if Path(checkpoint).exists():
            _resume(run, checkpoint, identity, chosen.epochs)

    steps = -(-len(rows) // chosen.batch_size)
    bar = tqdm(
        total=chosen.epochs * steps,
        initial=run.epoch * steps,
        desc=f"autoencoder r={rank}",
        unit="step",
        disable=None if progress is None else not progress,
    )
    with bar:
        while run.epoch < chosen.epochs:
            started = time.perf_counter()
            with _threads_for(chosen.batch_size * rows.shape[1] * rank):
                _train_epoch(run, rows, chosen, bar)
            entry = _measure(run.model, rows, chosen)
            score = entry["loss"]
            if validate is not None:
                score = float(validate(_factors(run.model, rows, table.dtype)))
                if not math.isfinite(score):
                    raise ValueError(f"validate: expected a finite score in epoch {run.epoch}, got {score}")
            entry |= {
                "epoch": run.epoch,
                "alpha": chosen.alpha(run.epoch),
                "lr": chosen.learning_rate(run.epoch),
                "score": score,
                "seconds": round(time.perf_counter() - started, 3),
            }
            run.history.append(entry)
            bar.set_postfix(loss=f"{entry['loss']:.4f}", direction=f"{entry['direction_error']:.4f}")
            if score < run.best_score:
                run.best_score, run.best_weights = score, _weights(run.model)
            run.epoch += 1
            if checkpoint is not None:
                _save(run, checkpoint, identity)
            if log is not None:
                with replacing(log) as temporary:
                    temporary.write_text("".join(json.dumps(line) + "\n" for line in run.history))
    run.model.load_state_dict(run.best_weights)
    return _factors(run.model, rows, table.dtype)


def _start(rows: Tensor, rank: int, options: AutoencoderOptions) -> _Run:
    with seeded(options.seed, torch.device("cpu")), torch.device("cpu"):  # the same start on every device
        model = Autoencoder(rows.shape[1], rank, options.activation)
    model.to(rows.device, rows.dtype)
    if options.init == "svd":
        model.init_from(svd(rows, rank))
    return _Run(model, torch.optim.Adam(model.parameters(), lr=options.lr, fused=True))


@contextlib.contextmanager
def _threads_for(multiplications: int) -> Iterator[None]:
    """Use no more CPU threads than a step has work for, a million multiplications each.

    A step of batch 32 is as fast on one thread as on two, and five times faster where another process keeps
    the second core busy: the threads would wait for each other at every one of its dozen small ops.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, multiplications // 2**20)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train_epoch(run: _Run, rows: Tensor, options: AutoencoderOptions, bar: tqdm) -> None:
    # A generator of its own for every epoch: no state to save, and the same order after a resume.
    generator = torch.Generator("cpu").manual_seed(options.seed * 1_000_003 + run.epoch)
    order = torch.randperm(len(rows), generator=generator, device="cpu").to(rows.device)
    alpha = options.alpha(run.epoch)
    for group in run.optimizer.param_groups:
        group["lr"] = options.learning_rate(run.epoch)
    for ids in order.split(options.batch_size):
        batch = rows[ids]
        loss = reconstruction_loss(run.model.decode(run.model.encode(batch)), batch, options, alpha)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        bar.update()


def reconstruction_loss(output: Tensor, target: Tensor, options: AutoencoderOptions, alpha: float) -> Tensor:
    """Loss of one batch: the four weighted terms of ``autoencoder``'s docstring."""
    loss = cosine_mse_loss(
        output, target, cosine_weight=options.cosine_weight, mse_weight=options.mse_weight, eps=options.eps
    )
    if options.rmse_weight:
        mse = cosine_mse_loss(output, target, cosine_weight=0.0)
        loss = loss + options.rmse_weight * (mse + 1e-20).sqrt()  # the root has no gradient at a perfect fit
    if options.power_weight:
        loss = loss + options.power_weight * ((output - target).abs() + 1e-10).pow(alpha).mean()
    return loss


@torch.no_grad()
def _measure(model: Autoencoder, rows: Tensor, options: AutoencoderOptions) -> dict[str, Any]:
    """Loss with the final alpha, direction error and RMSE over the whole table."""
    direction = squared = power = 0.0
    for block in blocks(rows):
        output = model.decode(model.encode(block))
        direction += len(block) * float(cosine_mse_loss(output, block, mse_weight=0.0, eps=options.eps))
        squared += len(block) * float(F.mse_loss(output, block))
        power += len(block) * float(((output - block).abs() + 1e-10).pow(options.alpha_end).mean())
    direction, squared, power = direction / len(rows), squared / len(rows), power / len(rows)
    loss = (
        options.cosine_weight * direction
        + options.mse_weight * squared
        + options.rmse_weight * squared**0.5
        + options.power_weight * power
    )
    if not loss < float("inf"):
        raise RuntimeError(f"autoencoder: the loss is {loss}; training diverged, lower lr ({options.lr:g})")
    return {"loss": loss, "direction_error": direction, "rmse": squared**0.5}


@torch.no_grad()
def _factors(model: Autoencoder, rows: Tensor, dtype: torch.dtype) -> Factors:
    codes = torch.cat([model.encode(block) for block in blocks(rows)])
    basis, offset = model.basis.detach().clone(), model.offset.detach().clone()
    return Factors(codes, basis, offset, model.activation).to(dtype)


def _weights(model: Autoencoder) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _save(run: _Run, path: str | os.PathLike, identity: dict[str, Any]) -> None:
    state = {
        "identity": identity,
        "epoch": run.epoch,
        "history": run.history,
        "best_score": run.best_score,
        "best_weights": run.best_weights,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
    }
    with replacing(path) as temporary:
        torch.save(state, temporary)


def _resume(run: _Run, path: str | os.PathLike, identity: dict[str, Any], epochs: int) -> None:
    try:
        state = torch.load(path, map_location=run.model.basis.device, weights_only=True)
        saved = state["identity"]
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise ValueError(f"checkpoint: {path} cannot be read ({error}); delete it to start anew") from error
    if saved != identity:
        different = [name for name in identity if saved.get(name) != identity[name]]
        raise ValueError(
            f"checkpoint: {path} belongs to another run (different {', '.join(different)}); "
            "delete it or name another file"
        )
    if state["epoch"] > epochs:
        raise ValueError(f"epochs: expected at least the checkpoint's {state['epoch']}, got {epochs}")
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.epoch, run.history = state["epoch"], state["history"]
    run.best_score, run.best_weights = state["best_score"], state["best_weights"]

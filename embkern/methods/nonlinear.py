"""The non-linear autoencoder of arXiv 2302.04045."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..tables.nonlinear import LAYERS, NonlinearTable, decoded
from .base import (
    Options,
    blocks,
    byte_budget,
    check_table,
    parse_options,
    ratio_error,
    row_weights,
    seeded,
)
from .storage import Storage, rounded, storage_dtype


class NonlinearAutoencoderOptions(Options):
    """Options of ``nonlinear_autoencoder``; the defaults are its authors' configuration."""

    cosine_weight: float = Field(0.9091, ge=0, description="of mean(1 - cos)")
    rmse_weight: float = Field(0.0909, ge=0, description="of sqrt(mean((x - y)^2)), the root taken per batch")
    lr: float = Field(1e-3, gt=0, description="Adam's learning rate")
    lr_step: int = Field(10, ge=1, description="epochs between two steps of the learning rate")
    lr_gamma: float = Field(0.8, gt=0, le=1, description="factor of each step of the learning rate")
    batch_size: int = Field(16, ge=1, description="rows per step")
    epochs: int = Field(30, ge=1, description="passes over the table")
    norms: Literal["original", "fitted", "none"] = Field(
        "original",
        description="lengths that are stored: those of the rows, those of the least squared error, or none",
    )
    weights: Literal["counts", "fisher"] = Field(
        "counts", description="rows weigh by token counts, or by given weights such as Fisher information"
    )
    exponent: float = Field(0.75, ge=0, description="rows weigh as their counts to this power")
    storage: Storage = Field("table", description="dtype of all stored values: the table's, or float16")
    seed: int = Field(1, ge=0, lt=2**32, description="seed of the initial weights and the order of rows")


def nonlinear_autoencoder(
    table: Tensor,
    *,
    ratio: float,
    counts: Tensor | None = None,
    row_weight: Tensor | None = None,
    **options: Any,
) -> NonlinearTable:
    """Codes, norms and a decoder of three layers, trained on cosine and RMSE.

    The layers of the encoder have widths 8r, 4r and r, each with a LeakyReLU; those of the decoder have
    widths 2r and 4r with a LeakyReLU, and H with Tanh. ``y = norm * F.normalize(decoder(encoder(x)))``, also
    in training. The loss of a batch is::

        cosine_weight * (1 - F.cosine_similarity(x, y)).mean() + rmse_weight * F.mse_loss(y, x).sqrt()

    With ``norms="fitted"`` the lengths that are stored are ``<x, F.normalize(decoder(encoder(x)))>`` after
    training, which have the least squared error. ``norms="none"`` stores none, so that codes may be wider:
    y is the decoder's output, whose values lie between -1 and 1. The authors' code has a switch for it.

    r is the largest whose codes, norms and decoder fit the ratio. After training with Adam the epoch with the
    least direction error is kept; the authors keep the one with the least perplexity. Training runs in plain
    torch and is slow on a CPU: a step takes one to two milliseconds, and 30 epochs of 30522 rows are 57,000
    steps. A step with ``batch_size=128`` takes little longer.

    Args:
        table: (V, H). Training runs in fp32 on its device.
        ratio: bytes of the table as stored over bytes of codes, norms and decoder.
        counts: (V,), how often each token is read; both means become weighted means. None weighs all rows
            equally.
        row_weight: (V,), weights of the rows in place of counts; ``weights="fisher"`` demands them. The
            authors use the square root of the Fisher information, ``fisher_row_weights(...).sqrt()``; rows
            that no text has read need a constant that is added before. Recipes and commands do both with
            the weights of ``fisher_weights``.
        options: the fields of ``NonlinearAutoencoderOptions``.

    Raises:
        ValueError, TypeError: the ratio cannot be reached (the message names the highest that can), or an
            argument is not usable.
        RuntimeError: training diverged.

    Source: arXiv 2302.04045 and its authors' code.
    """
    chosen = parse_options(NonlinearAutoencoderOptions, options, "nonlinear_autoencoder")
    check_table(table)
    budget = byte_budget(table, ratio)
    dtype = storage_dtype(table, chosen.storage)
    width = _largest_width(table, ratio, budget // dtype.itemsize, dtype.itemsize, chosen.norms != "none")
    weights = len(table) * _weights(counts, row_weight, chosen, len(table))  # with a mean of 1
    weights = weights.to(table.device, torch.float32)
    with seeded(chosen.seed, table.device):
        trained = _Autoencoder(table.shape[1], width, chosen.norms != "none").to(table.device)
        losses = _train(trained, table.detach(), weights, chosen)
    return _stored(trained, table.detach(), dtype, chosen.norms, {"r": width, "direction_errors": losses})


def _weights(
    counts: Tensor | None, row_weight: Tensor | None, options: NonlinearAutoencoderOptions, V: int
) -> Tensor:
    """Return row weights (V,) float64 with a sum of 1."""
    if row_weight is None:
        if options.weights == "fisher":
            raise ValueError(
                "weights: expected with 'fisher' a file of `embkern fisher`, or row_weight, got none"
            )
        return row_weights(counts, V, options.exponent)
    if counts is not None:
        raise ValueError("counts, row_weight: expected at most one of them, got both")
    return row_weights(row_weight, V, name="row_weight")


def _largest_width(table: Tensor, ratio: float, values: int, itemsize: int, norms: bool) -> int:
    """Return the largest r, at most H, whose stored values are at most ``values``."""
    V, H = table.shape

    def size(r: int) -> int:
        return V * (r + norms) + 2 * r * (r + 1) + 4 * r * (2 * r + 1) + H * (4 * r + 1)

    if size(1) > values:
        raise ratio_error(table, ratio, size(1) * itemsize)
    width = 1
    while width < H and size(width + 1) <= values:
        width += 1
    return width


class _Autoencoder(nn.Module):
    def __init__(self, width: int, r: int, norms: bool) -> None:
        super().__init__()
        self.norms = norms
        self.encoder = nn.Sequential(
            nn.Linear(width, 8 * r),
            nn.LeakyReLU(),
            nn.Linear(8 * r, 4 * r),
            nn.LeakyReLU(),
            nn.Linear(4 * r, r),
            nn.LeakyReLU(),
        )
        self.decoder = nn.ModuleList([nn.Linear(r, 2 * r), nn.Linear(2 * r, 4 * r), nn.Linear(4 * r, width)])

    def forward(self, rows: Tensor) -> Tensor:
        norms = rows.norm(dim=1, keepdim=True) if self.norms else None
        return decoded(self.encoder(rows), norms, list(self.decoder.parameters()))


@torch.enable_grad()
def _train(
    model: _Autoencoder, table: Tensor, weights: Tensor, options: NonlinearAutoencoderOptions
) -> list[float]:
    """Train and load the parameters of the best epoch; return the direction error after every epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, options.lr_step, options.lr_gamma)
    errors: list[float] = []
    best: dict[str, Tensor] = {}
    for _ in range(options.epochs):
        for ids in torch.randperm(len(table), device="cpu").to(table.device).split(options.batch_size):
            rows, weight = table[ids].float(), weights[ids]
            copies = model(rows)
            cosine = 1 - F.cosine_similarity(rows, copies, eps=1e-6)
            squared = (rows - copies).square().mean(1)
            # The root's gradient is infinite at 0.
            rmse = ((weight * squared).sum() / weight.sum() + 1e-20).sqrt()
            loss = options.cosine_weight * (weight @ cosine) / weight.sum() + options.rmse_weight * rmse
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        errors.append(direction_error_of(model, table, weights))
        if not math.isfinite(errors[-1]):
            raise RuntimeError(
                f"nonlinear_autoencoder: the direction error is {errors[-1]}; training diverged, "
                f"lower lr ({options.lr:g})"
            )
        if errors[-1] == min(errors):
            best = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best)
    return errors


@torch.no_grad()
def direction_error_of(model: _Autoencoder, table: Tensor, weights: Tensor) -> float:
    """Return the mean of 1 - cos over the rows of a table with weights."""
    cosine = [F.cosine_similarity(rows.float(), model(rows.float()), eps=1e-30) for rows in blocks(table)]
    return float(weights.double() @ (1 - torch.cat(cosine)).double() / len(table))


@torch.no_grad()
def _stored(
    model: _Autoencoder, table: Tensor, dtype: torch.dtype, norms: str, facts: dict[str, Any]
) -> NonlinearTable:
    """Return codes, norms and decoder, rounded to ``dtype``."""

    def lengths(rows: Tensor) -> Tensor:
        own = rows.norm(dim=1)
        return own if norms == "original" else own * F.cosine_similarity(rows, model(rows), eps=1e-30)

    layers = [rounded(parameter.detach(), dtype) for parameter in model.decoder.parameters()]
    parts = [] if norms == "none" else [rounded(lengths(some.float()), dtype) for some in blocks(table)]
    return NonlinearTable(
        torch.cat([rounded(model.encoder(some.float()), dtype) for some in blocks(table)]),
        **dict(zip(LAYERS, layers, strict=True)),
        norms=torch.cat(parts) if parts else None,
        num_embeddings=table.shape[0],
        embedding_dim=table.shape[1],
        facts=facts,
        check=False,
    )

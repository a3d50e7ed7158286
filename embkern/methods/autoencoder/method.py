"""The autoencoder of arXiv 2106.08181: a linear encoder and decoder, trained on the direction of rows."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...tables.factors import Factors, check_rank
from ..base import Rows, check_shape, parse_options
from ..sharded import World
from .checkpoint import RunFiles, check_files
from .options import AutoencoderOptions
from .trainer import Trainer


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

    The defaults are the authors' configuration: 30 epochs of batch 32, and an alpha that falls from 1 to 0.1
    over 20 epochs. Training runs in fp32 (float64 for a float64 table) on the table's device. The order of
    rows depends only on the seed and the epoch, so a resumed run ends with the weights of an uninterrupted
    one. With ``batch_size >= V`` every epoch is one step on the whole table. The gradient of a batch of more
    than 8192 rows (65536 on CUDA; fewer for rows wider than 1024) is summed in blocks of 8192 rows, so its
    memory besides the table is a few copies of the weights and one block. A ``TableFile`` is read block by
    block and gives the same bits as its rows in memory on the same device.

    Args:
        table: (V, H), in memory or a ``TableFile``.
        rank: r, 1 to H.
        validate: returns the score of the factors after an epoch, lower is better; the best epoch is kept.
            The default is the loss over the whole table, with alpha at ``alpha_end`` so that epochs compare.
        checkpoint: file that is replaced after an epoch. If it exists, the run resumes from it; ``validate``
            must then be the same as before, because the scores so far are kept.
        checkpoint_seconds: least time between two checkpoints; the last epoch is always saved.
        log: file of JSON lines, one per epoch: epoch, loss, direction_error, rmse, alpha, lr, score, seconds.
            It is written as often as the checkpoint.
        progress: show a progress bar on stderr; None shows it only on a terminal.
        engine: implementation of the training steps: ``native`` (C++ on the CPU, linear only), ``graph`` (a
            CUDA graph, linear only) or ``torch``; None takes the first that supports the run. Engines differ
            in rounding.
        world: the processes and shards of a distributed run, see ``embkern.methods.sharded``.
        options: the fields of ``AutoencoderOptions``.

    Returns:
        Factors in the table's dtype, with an offset, of the best epoch; ``facts`` has its number, loss,
        direction error and RMSE.

    Raises:
        ValueError, TypeError: the rank or an option is out of range, the table is not usable, or the
            checkpoint belongs to another run or is damaged, or ``validate`` returns a number that is not
            finite.
        FileNotFoundError: the directory of ``checkpoint`` or ``log`` does not exist.
        OSError: one of them cannot be written. A read-only directory is found before training, a full disk
            after an epoch; an existing file stays intact.
        RuntimeError: the loss is no longer finite, or the requested engine does not support the run.

    Source: arXiv 2106.08181, section 3, and its authors' released configuration.
    """
    chosen = parse_options(AutoencoderOptions, options, "autoencoder")
    check_shape(table)
    check_rank(rank, table.shape[1])
    if not checkpoint_seconds >= 0:
        raise ValueError(f"checkpoint_seconds: expected at least 0, got {checkpoint_seconds}")
    world = world or World()
    world.on_first(lambda: check_files(checkpoint=checkpoint, log=log))
    # Training must not depend on the caller's modes: no_grad, inference, autocast or a default device.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(table.device.type, enabled=False),
        torch.device(table.device),
    ):
        if isinstance(table, Tensor):
            # Autograd cannot save inference tensors for backward, so they are copied; other tables are not.
            table = table.clone() if table.is_inference() else table.detach()
        trainer = Trainer(table, rank, chosen, engine, world, progress)
        return trainer.train(validate, RunFiles(checkpoint, log, checkpoint_seconds))

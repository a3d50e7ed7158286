"""Train the autoencoder on a table in a safetensors file, in one process or under torchrun."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field

from .io.atomic import new_file
from .io.mapped_table import TableFile
from .methods.sharded import SHARDS, TIMEOUT, World, joined, launched
from .recipe import Recipe


class Trained(BaseModel):
    """The result of ``train``: the size of the factors, and the quality of their epoch, the best one."""

    output: str = Field(description="file of the factors")
    num_embeddings: int = Field(description="V")
    embedding_dim: int = Field(description="H")
    rank: int
    dtype: str
    table_bytes: int = Field(description="bytes of the table")
    compressed_bytes: int = Field(description="bytes of everything that replaces it")
    ratio: float = Field(description="table_bytes / compressed_bytes")
    epoch: int = Field(description="the best epoch, counted from 0")
    loss: float = Field(description="its loss over the table, with alpha at alpha_end")
    direction_error: float = Field(description="its mean over rows of 1 - cos(row, reconstruction)")
    rmse: float = Field(description="its root mean squared error over all entries")
    processes: int
    seconds: float

    def rows(self) -> dict[str, str]:
        """Return the rows of the printed table by name."""
        return {
            "rank": f"{self.rank} of {self.embedding_dim}",
            "table, bytes": f"{self.table_bytes:,} -> {self.compressed_bytes:,} ({self.ratio:.2f}x)",
            "best epoch": str(self.epoch),
            "direction error (1 - cos), mean": f"{self.direction_error:.4f}",
            "RMSE": f"{self.rmse:.5f}",
            "processes": str(self.processes),
            "seconds": f"{self.seconds:.1f}",
        }


def train(
    path: str | os.PathLike,
    tensor: str,
    recipe: Recipe,
    output: str | os.PathLike,
    *,
    overwrite: bool = False,
    device: str | None = None,
    shards: int | None = None,
    timeout: float = TIMEOUT,
    log: str | os.PathLike | None = None,
    **run: Any,
) -> Trained | None:
    """Train on the rows of one tensor in a safetensors file, and write the factors to another file.

    The rows are streamed: of the table, only the codes (V, r) are in memory. Under torchrun the processes
    divide the table's shards among them. The result has the same bits for any number of processes, one
    included, with the same ``shards``.

    Args:
        path: the safetensors file.
        tensor: name of the table (V, H) in it.
        recipe: a recipe of the method ``autoencoder``.
        output: file to write, with ``Factors.save``.
        overwrite: whether to replace an existing file.
        device: device such as ``cpu`` or ``cuda``; None takes a CUDA device if there is one, under torchrun
            that of ``LOCAL_RANK``.
        shards: number of parts whose sums are added in a fixed order. None takes 8 under torchrun and does
            not divide the table in one process; the last bits of these two results differ.
        timeout: under torchrun, seconds after which a process that does not respond counts as lost.
        log: file of JSON lines, one per epoch.
        run: ``checkpoint``, ``checkpoint_seconds``, ``engine`` and ``progress`` of ``autoencoder``.

    Returns:
        The result; None on all processes but the first.

    Raises:
        ValueError, TypeError: an argument or the table is wrong; the message names it.
        FileNotFoundError: the table, or the directory of ``output``, does not exist.
        FileExistsError: ``output`` exists and ``overwrite`` is False.
        OSError: ``output``, the checkpoint or the log cannot be written; where possible this is found before
            the training.
        RankLostError: another process ended; the message tells what is kept.
    """
    started = time.perf_counter()
    if recipe.method != "autoencoder":
        raise ValueError(f"method: expected autoencoder, got {recipe.method!r}")
    if not timeout > 0:
        raise ValueError(f"timeout: expected more than 0 seconds, got {timeout}")
    if shards is not None and shards < 1:
        raise ValueError(f"shards: expected at least 1, got {shards}")
    torch_device = _device(device)
    with contextlib.ExitStack() as stack:
        world = World(shards or 1)
        if launched():
            world = stack.enter_context(joined(shards or SHARDS, timeout, torch_device.type))
        world.on_first(lambda: _check_output(output, overwrite, path))
        table = TableFile(path, tensor, torch_device)
        factors = recipe.factorize(table, log=log, world=world, **run)
        world.on_first(lambda: factors.save(output))
        if world.rank:
            return None
    best = factors.facts
    return Trained(
        output=os.fspath(output),
        num_embeddings=factors.num_embeddings,
        embedding_dim=factors.embedding_dim,
        rank=factors.rank,
        dtype=str(factors.dtype).removeprefix("torch."),
        table_bytes=table.nbytes,
        compressed_bytes=factors.nbytes,
        ratio=table.nbytes / factors.nbytes,
        epoch=best["epoch"],
        loss=best["loss"],
        direction_error=best["direction_error"],
        rmse=best["rmse"],
        processes=world.size,
        seconds=round(time.perf_counter() - started, 3),
    )


def _device(name: str | None) -> torch.device:
    """Return the device of this process; under torchrun each process has its own CUDA device."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected a device such as cpu or cuda:0, got {name!r}") from None
    if device.type != "cuda":
        return device
    index = device.index
    if index is None:
        index = int(os.environ.get("LOCAL_RANK", 0)) if launched() else 0
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected one of {torch.cuda.device_count()} CUDA devices, got cuda:{index}"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _check_output(output: str | os.PathLike, overwrite: bool, table: str | os.PathLike) -> None:
    """Raise unless the factors may be written to ``output``."""
    if Path(output).resolve() == Path(table).resolve():
        raise ValueError(f"output: {output} is the table to read; choose another name")
    new_file(output, overwrite)

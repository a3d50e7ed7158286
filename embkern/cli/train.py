"""``embkern train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import AsJson, print_json, print_rows
from .recipe import recipe_of


def train(
    table: Annotated[Path, typer.Argument(help="a safetensors file", metavar="TABLE")],
    tensor: Annotated[str, typer.Option(help="name of the table (V, H) in it")],
    output: Annotated[Path, typer.Option("--output", "-o", help="safetensors file of the factors to write")],
    ratio: Annotated[
        float | None, typer.Option(help="bytes of the table over bytes of what replaces it")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="width of the codes, instead of a ratio")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file; flags override it")] = None,
    epochs: Annotated[int | None, typer.Option(help="passes over the table")] = None,
    batch_size: Annotated[int | None, typer.Option(help="rows per step; V or more: the whole table")] = None,
    lr: Annotated[float | None, typer.Option(help="Adam's learning rate")] = None,
    init: Annotated[str | None, typer.Option(help="random or svd")] = None,
    activation: Annotated[str | None, typer.Option(help="elu")] = None,
    seed: Annotated[
        int | None, typer.Option(help="random seed of the initial weights and of the order of rows")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="implementation of the training steps: native, graph or torch")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="device such as cpu or cuda (default: cuda if available)")
    ] = None,
    shards: Annotated[
        int | None, typer.Option(help="number of parts of the table, which sets the last bits (torchrun: 8)")
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="torchrun: seconds after which a silent process counts as lost")
    ] = 60.0,
    checkpoint: Annotated[Path | None, typer.Option(help="file from which a killed run is resumed")] = None,
    checkpoint_seconds: Annotated[float, typer.Option(help="least time between two checkpoints")] = 5.0,
    log: Annotated[Path | None, typer.Option(help="file of JSON lines, one per epoch")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing file")] = False,
    as_json: AsJson = False,
) -> None:
    """Train the autoencoder on a table in a file of any size, in one process or under torchrun."""
    from ..train import train as train_file

    flags = {
        "epochs": epochs, "batch_size": batch_size, "lr": lr, "init": init, "activation": activation,
        "seed": seed,
    }  # fmt: skip
    parsed = recipe_of(recipe, {"ratio": ratio, "rank": rank}, flags, method="autoencoder")
    done = train_file(
        table, tensor, parsed, output,
        overwrite=overwrite, device=device, shards=shards, timeout=timeout, log=log,
        checkpoint=checkpoint, checkpoint_seconds=checkpoint_seconds, engine=engine,
    )  # fmt: skip
    if done is None:  # only the first process prints the result
        return
    if as_json:
        print_json(done)
        return
    print_rows(done.rows(), f"{table} -> {output}")

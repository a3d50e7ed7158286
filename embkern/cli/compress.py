"""``embkern compress``."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated

import typer

from .console import AsJson, Model, Output, Overwrite, Text, print_comparison, print_json
from .recipe import options_of, recipe_of, tables_of


def compress(
    model: Model,
    output: Output,
    ratio: Annotated[
        float | None, typer.Option(help="bytes of the table over bytes of what replaces it")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="width of the codes, instead of a ratio")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="allocate (default), direction, autoencoder, svd, fwsvd, tfwsvd, prune, "
            "product_quantization, rtn, lloyd_max, tensor_train or nonlinear_autoencoder"
        ),
    ] = None,
    lm_head: Annotated[
        str | None,
        typer.Option(help="tied head: factorized (default) shares the compressed table, dense keeps its own"),
    ] = None,
    tables: Annotated[
        list[str] | None,
        typer.Option(
            help="a table to compress, by name or pattern, or NAME=RATIO: 'input' is the default, 'output' "
            "an untied head; repeatable"
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file; flags override it")] = None,
    text: Text = None,
    counts: Annotated[
        Path | None, typer.Option(help="token frequencies: a file that `embkern count` wrote")
    ] = None,
    count_text: Annotated[
        list[str] | None,
        typer.Option(help="text to count token frequencies in: file, directory or data set; repeatable"),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="allocate: a file that `embkern calibrate` wrote")
    ] = None,
    calibrate_text: Annotated[
        list[str] | None,
        typer.Option(help="allocate: text to calibrate on: file, directory or data set; repeatable"),
    ] = None,
    calibrate: Annotated[
        bool | None,
        typer.Option(
            help="allocate: calibrate on samples of the model itself; default: for causal language models, "
            "if it takes less than ten minutes"
        ),
    ] = None,
    fisher: Annotated[
        Path | None,
        typer.Option(
            help="fwsvd, tfwsvd, nonlinear_autoencoder: weights, a file that `embkern fisher` wrote"
        ),
    ] = None,
    floor: Annotated[float | None, typer.Option(help="allocate: least cosine of any row")] = None,
    speed: Annotated[
        float | None, typer.Option(help="allocate: share of the lookups, 0 to 1, that need no matrix product")
    ] = None,
    exponent: Annotated[
        float | None, typer.Option(help="allocate, direction: weight of a row = frequency to this power")
    ] = None,
    unseen: Annotated[
        str | None,
        typer.Option(
            help="allocate: what tokens get that the counted text lacks: allocate (default), a rate as all "
            "others; mean or nearest, no bytes and the mean row or the nearest row that is stored"
        ),
    ] = None,
    keep_unseen: Annotated[
        Path | None,
        typer.Option(help="allocate --unseen, prune: file for the rows that are not stored, for restore"),
    ] = None,
    unknown: Annotated[
        str | None,
        typer.Option(help="prune: what a token that was not kept gets: mean (default), nearest or error"),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="autoencoders: passes over the table")] = None,
    batch_size: Annotated[int | None, typer.Option(help="autoencoders: rows per step")] = None,
    lr: Annotated[float | None, typer.Option(help="autoencoders: Adam's learning rate")] = None,
    init: Annotated[str | None, typer.Option(help="autoencoder: random or svd")] = None,
    activation: Annotated[str | None, typer.Option(help="autoencoder: elu")] = None,
    center: Annotated[
        bool | None, typer.Option("--center", help="svd: PCA with a mean; direction: with an offset")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="random seed of the method")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="any option of the method, as NAME=VALUE; repeatable", metavar="NAME=VALUE"),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="autoencoder: file from which a killed run is resumed")
    ] = None,
    log: Annotated[Path | None, typer.Option(help="autoencoder: file of JSON lines, one per epoch")] = None,
    timeout: Annotated[
        float, typer.Option(help="torchrun: seconds after which a silent process counts as lost")
    ] = 3600.0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Compress a model's token embeddings and save the result."""
    from .. import api
    from ..methods.sharded import joined, launched

    flags = {
        "epochs": epochs, "batch_size": batch_size, "lr": lr, "init": init, "activation": activation,
        "center": center, "seed": seed, "floor": floor, "speed": speed, "exponent": exponent,
        "unknown": unknown, "unseen": unseen, **options_of(option),
    }  # fmt: skip
    fields = {
        "method": method, "ratio": ratio, "rank": rank, "lm_head": lm_head, "calibrate": calibrate,
        "tables": tables_of(tables),
    }  # fmt: skip
    parsed = recipe_of(recipe, fields, flags)
    several = launched() and os.environ["WORLD_SIZE"] != "1"
    with joined(timeout=timeout) if several else contextlib.nullcontext() as world:
        report = api.compress(
            model, recipe=parsed, counts=counts, count_text=count_text, text=text,
            calibration=calibration, calibrate_text=calibrate_text, fisher=fisher, output=output,
            keep_unseen=keep_unseen, overwrite=overwrite, checkpoint=checkpoint, log=log, world=world,
        )  # fmt: skip
        if world is not None and world.rank:  # the first process prints the result
            return
    if as_json:
        print_json(report)
    else:
        print_comparison(report, f"{model} -> {output}")
        for name, size in report.other_tables.items():
            typer.echo(f"not compressed: {name}, another embedding table of {size:,} bytes", err=True)
        print("\n".join(report.usage(str(output))))

"""``embkern fisher``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import AsJson, Model, print_json, print_rows


def fisher(
    model: Model,
    text: Annotated[
        list[str],
        typer.Option(
            "--text", help="a file, a directory, or name:config:split:column of a data set; repeatable"
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="safetensors file of the weights to write")],
    tokens: Annotated[int, typer.Option(help="number of tokens to read of the text")] = 65536,
    head: Annotated[
        bool, typer.Option("--head", help="count gradients through a tied output head, too")
    ] = False,
    length: Annotated[int, typer.Option(help="longest input in tokens")] = 128,
    seed: Annotated[int, typer.Option(help="random seed of masks")] = 0,
    errors: Annotated[
        str, typer.Option(help="bytes that are not UTF-8 text: strict (an error) or replace")
    ] = "strict",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing file")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure how much a model's loss depends on each entry of its embedding table, as weights."""
    from ..models.fisher_file import fisher_files

    summary = fisher_files(
        model, text, output, tokens=tokens, head=head, length=length, seed=seed, errors=errors,
        overwrite=overwrite,
    )  # fmt: skip
    if as_json:
        print_json(summary)
        return
    print_rows(summary.rows(), f"{model} -> {output}")

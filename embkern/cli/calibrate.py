"""``embkern calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import AsJson, Model, print_json, print_rows


def calibrate(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="safetensors file of the calibration to write")
    ],
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", help="a file, a directory, or name:config:split:column of a data set; repeatable"
        ),
    ] = None,
    own_samples: Annotated[
        bool,
        typer.Option("--self", help="instead of text: samples of a language model itself"),
    ] = False,
    add: Annotated[
        list[Path] | None,
        typer.Option("--add", help="a calibration of the same model to add to the result; repeatable"),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="tokens to measure on: 16384 of text, 8192 of samples by default")
    ] = None,
    length: Annotated[int, typer.Option(help="longest input in tokens")] = 256,
    seed: Annotated[int, typer.Option(help="random seed of labels, masks and samples")] = 0,
    errors: Annotated[
        str, typer.Option(help="bytes that are not UTF-8 text: strict (an error) or replace")
    ] = "strict",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing file")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure how a model's output depends on its embedding table, on text or on the model's own samples."""
    from ..api import calibrate_files

    try:
        summary = calibrate_files(
            model, text or (), output, own_samples=own_samples, add=add or (), tokens=tokens, length=length,
            seed=seed, errors=errors, overwrite=overwrite,
        )  # fmt: skip
    except KeyboardInterrupt:
        if Path(f"{output}.partial").exists():
            typer.echo(f"embkern: interrupted; the same command resumes from {output}.partial", err=True)
        raise
    if as_json:
        print_json(summary)
        return
    print_rows(summary.rows(), f"{model} -> {output}")

"""``embkern count``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import AsJson, print_json, print_rows


def count(
    model: Annotated[
        str, typer.Argument(help="a directory with a tokenizer, or a name on the hub", metavar="MODEL")
    ],
    text: Annotated[
        list[str],
        typer.Option(
            "--text", help="a file, a directory, or name:config:split:column of a data set; repeatable"
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="safetensors file of the counts to write")],
    errors: Annotated[
        str, typer.Option(help="bytes that are not UTF-8 text: strict (an error) or replace")
    ] = "strict",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing file")] = False,
    as_json: AsJson = False,
) -> None:
    """Count how often each token of a model's tokenizer occurs in text."""
    from ..api import count_files

    summary = count_files(model, text, output, errors=errors, overwrite=overwrite)
    if as_json:
        print_json(summary)
        return
    print_rows(summary.rows(), f"{', '.join(text)} -> {output}")

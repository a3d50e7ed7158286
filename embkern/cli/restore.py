"""``embkern restore``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import Output, Overwrite


def restore(
    directory: Annotated[str, typer.Argument(help="a model compressed with --keep-unseen", metavar="DIR")],
    rows: Annotated[Path, typer.Option(help="the file that --keep-unseen wrote")],
    output: Output,
    overwrite: Overwrite = False,
) -> None:
    """Write a compressed model as a dense one, with the rows that its table does not store."""
    from .. import restoring

    restoring.restore(directory, rows, output, overwrite=overwrite)
    print(f"{directory} and {rows} -> {output} (dense)")

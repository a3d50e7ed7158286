"""``embkern convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .console import NARROW, AsJson, console, print_json


def convert(
    path: Annotated[
        Path,
        typer.Argument(
            help="a model directory or the file of a packed table, of the format's first edition",
            metavar="DIR_OR_FILE",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="what to write; it is complete or does not exist"),
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="replace what is read, in one step at the end")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing output")] = False,
    as_json: AsJson = False,
) -> None:
    """Convert packed tables of the format's first edition, which torch decodes, to the second one.

    Rows keep their bits, and everything else of a model stays as it is. Codes of 1 to 4 bits are encoded
    again from what they decode to, so that the new error, which is printed, adds to the old one. Compress the
    dense model again where it is at hand.
    """
    from .. import converting

    found = converting.convert(path, output, in_place=in_place, overwrite=overwrite)
    if as_json:
        print_json(found)
        return
    shown = Table(
        "table", "before", "after", "1 - cos", "MSE", "share", title=escape(f"{path} -> {found.output}")
    )
    for each in found.tables:
        errors = f"{each.direction_error:.5f}", f"{each.mse:.3g}", f"{each.squared_error:.4%}"
        shown.add_row(escape(each.name), f"{each.bytes_before:,}", f"{each.bytes_after:,}", *errors)
    narrow = console(NARROW)
    narrow.print(shown)
    narrow.print("Bytes of each table, and the error that was added: means of 1 - cos and of the")
    narrow.print("squared error, and this error as a share of the squared norms of the rows.")

"""``embkern export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import Overwrite

FORMATS = ("dense", "onnx")


def export(
    directory: Annotated[str, typer.Argument(help="a compressed model", metavar="DIR")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="what to write: a directory for dense, a file for the others"),
    ],
    format: Annotated[
        str,
        typer.Option(
            help="dense: a model that loads without embkern; onnx: a file in which the table stays compressed"
        ),
    ] = "dense",
    bits: Annotated[
        int | None,
        typer.Option(help="onnx: 4 or 8 rounds the table to so many bits, for operators of onnxruntime"),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a compressed model as one that needs no embkern."""
    if bits is not None and format != "onnx":
        raise ValueError(f"bits: expected none for the format {format}, got {bits}")
    if format == "dense":
        from ..api import export_dense

        export_dense(directory, output, overwrite=overwrite)
    elif format == "onnx":
        from ..export.onnx import export_onnx

        export_onnx(directory, output, bits=bits, overwrite=overwrite)
    else:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    print(f"{directory} -> {output} ({format})")

"""``embkern export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import Overwrite

FORMATS = ("dense", "onnx", "gguf")


def export(
    directory: Annotated[str, typer.Argument(help="a compressed model", metavar="DIR")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="what to write: a directory for dense, a file for the others"),
    ],
    format: Annotated[
        str,
        typer.Option(
            help="dense: a model that loads without embkern; onnx: a file whose table stays compressed; "
            "gguf: a file of a language model, without its tokenizer"
        ),
    ] = "dense",
    bits: Annotated[
        int | None,
        typer.Option(
            help="onnx: 4 or 8 rounds the table to so many bits, for operators of onnxruntime; "
            "gguf: 4 (Q4_0) or 8 (Q8_0, the default)"
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a compressed model as one that needs no embkern."""
    if format == "dense":
        if bits is not None:
            raise ValueError(f"bits: expected none for the format dense, got {bits}")
        from ..api import export_dense

        export_dense(directory, output, overwrite=overwrite)
    elif format == "onnx":
        from ..export.onnx import export_onnx

        export_onnx(directory, output, bits=bits, overwrite=overwrite)
    elif format == "gguf":
        from ..export.gguf import export_gguf

        export_gguf(directory, output, bits=8 if bits is None else bits, overwrite=overwrite)
    else:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    print(f"{directory} -> {output} ({format})")

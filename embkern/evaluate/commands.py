"""The commands of ``embkern evaluate``."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..console import AsJson, Text, console, print_comparison, print_json

app = typer.Typer(no_args_is_help=True, help="Measure what a compressed model keeps of the dense one.")


@app.command()
def table(
    directory: Annotated[str, typer.Argument(help="a compressed model", metavar="DIR")],
    against: Annotated[str, typer.Option(help="the dense model it came from")],
    text: Text = None,
    as_json: AsJson = False,
) -> None:
    """Compare a compressed model with the dense one: table, nearest neighbours, sentence embeddings."""
    from .. import inspection

    result = inspection.evaluate(directory, against, text=text)
    if as_json:
        print_json(result)
        return
    print_comparison(result, f"{directory} against {against}")


@app.command()
def perplexity(
    models: Annotated[
        list[str],
        typer.Argument(
            help="a masked or causal language model, dense or compressed; with --against compressed ones",
            metavar="MODEL_OR_DIR...",
        ),
    ],
    dataset: Annotated[
        str, typer.Option(help="text: a file, a directory, or name:config:split:column of a data set")
    ],
    against: Annotated[
        str | None, typer.Option(help="the dense model, measured beside: input only and with the tied head")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="masked: of the masks, 0 by default")] = None,
    masking: Annotated[
        str | None, typer.Option(help="masked: 80-10-10 (default: mask, random, unchanged) or mask alone")
    ] = None,
    mask_probability: Annotated[float | None, typer.Option(help="masked: 0.15 by default")] = None,
    line_filter: Annotated[
        str | None, typer.Option(help="masked: authors leaves '=' out, then texts below 20 tokens")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="tokens of a window; the model's, at most 512 (masked) or 1024")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="causal: tokens by which windows slide; half of their length")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="read so many tokens of the text")] = None,
    batch_size: Annotated[int | None, typer.Option(help="windows at once, 8 by default")] = None,
    device: Annotated[str | None, typer.Option(help="such as cuda; the CPU by default")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="such as bfloat16; that of the weights by default")
    ] = None,
    errors: Annotated[str, typer.Option(help="bytes that are not UTF-8 text: strict or replace")] = "strict",
    as_json: AsJson = False,
) -> None:
    """Measure zero-shot perplexity: of one model, or of a dense one beside those compressed from it."""
    from .perplexity import measure_perplexity

    flags: dict[str, Any] = {
        "seed": seed, "masking": masking, "mask_probability": mask_probability, "line_filter": line_filter,
        "max_length": max_length, "stride": stride, "max_tokens": max_tokens, "batch_size": batch_size,
    }  # fmt: skip
    run = measure_perplexity(
        models, dataset, against=against, device=device, dtype=dtype, errors=errors,
        command=shlex.join(["embkern", *sys.argv[1:]]),
        **{name: value for name, value in flags.items() if value is not None},
    )  # fmt: skip
    if as_json:
        print_json(run)
        return
    shown = Table("model", "bytes of the table", "x", title=escape(f"perplexity on {dataset}"))
    for column in run.columns:
        shown.add_column(column, justify="right")
    for row in run.rows():
        shown.add_row(*map(escape, row))
    console().print(shown)
    typer.echo(f"{run.model.kind} language model, {run.model.tokens:,} of {run.read:,} tokens scored")

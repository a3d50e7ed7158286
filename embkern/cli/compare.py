"""``embkern compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from .console import AsJson, Model, Text, console, print_json

if TYPE_CHECKING:
    from ..study.verdict import Best


def compare(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="directory of the report and of the measured rows")
    ],
    ratios: Annotated[
        list[float] | None, typer.Option(help="bytes before over bytes after (default: 5 10 16 32)")
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME or NAME:option=value,... (default: svd autoencoder direction allocate)", metavar="NAME"
        ),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="file, directory or data set: perplexity of a language model on it")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="number of tokens to read of the data set")] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens per window of a language model")] = None,
    stride: Annotated[int | None, typer.Option(help="causal: tokens from one window to the next")] = None,
    separator: Annotated[
        str | None, typer.Option(help="causal: what separates texts, newline (default) or eos")
    ] = None,
    line_filter: Annotated[
        str | None, typer.Option(help="masked: authors, to filter lines as the paper's authors did")
    ] = None,
    text: Text = None,
    counts: Annotated[
        Path | None, typer.Option(help="token frequencies: a file that `embkern count` wrote")
    ] = None,
    count_text: Annotated[
        list[str] | None, typer.Option(help="text to count token frequencies in: file, directory or data set")
    ] = None,
    fisher: Annotated[
        Path | None,
        typer.Option(
            help="fwsvd, tfwsvd, nonlinear_autoencoder: weights, a file that `embkern fisher` wrote"
        ),
    ] = None,
    words: Annotated[
        list[str] | None, typer.Option(help="words whose nearest neighbours the report lists")
    ] = None,
    device: Annotated[str | None, typer.Option(help="device such as cuda; the CPU by default")] = None,
    seed: Annotated[int, typer.Option(help="random seed of the methods and of samples")] = 0,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="save the compressed models")] = False,
    row: Annotated[
        str | None, typer.Option(help="measure one row again and print it, without changing the report")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="measure finished rows again")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare methods at several ratios and write one report; an interrupted comparison is resumed.

    Options with several values take them in a row: --ratios 5 10 --methods svd allocate:floor=0.5
    """
    from .. import study

    given = {
        "ratios": ratios, "methods": methods, "dataset": dataset, "max_tokens": max_tokens,
        "max_length": max_length, "stride": stride, "separator": separator, "line_filter": line_filter,
        "text": text, "counts": counts, "count_text": count_text, "fisher": fisher, "words": words,
        "device": device, "seed": seed, "keep_models": keep_models,
    }  # fmt: skip
    options: dict[str, Any] = {name: value for name, value in given.items() if value not in (None, [])}
    if row is not None:
        print_json(study.compare_row(model, row, output=output, **options))
        return
    done = study.compare(model, output=output, overwrite=overwrite, **options)
    if as_json:
        print_json(done)
        return
    _print_verdict(study.verdicts_of(done))
    print(f"{done.measured} of {len(done.rows)} rows measured in {done.seconds:g} s -> {done.page}")


def _print_verdict(found: list[Best]) -> None:
    """Print the best method at each ratio, and the commands that make the models."""
    if not found:
        return
    table = Table("ratio", "best method", found[0].criterion.title, "model smaller by")
    for best in found:
        table.add_row(f"{best.row.ratio:g}", escape(best.row.method), *best.figures)
    console().print(table)
    for best in found:
        print(best.command)

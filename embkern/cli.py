"""The command line. Tables and JSON go to stdout, progress to stderr."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ._version import __version__
from .console import (
    AsJson,
    ManyValues,
    Model,
    Output,
    Overwrite,
    Text,
    console,
    print_comparison,
    print_json,
)
from .evaluate.commands import app as evaluate_app

if TYPE_CHECKING:
    from .recipe import Recipe

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(evaluate_app, name="evaluate")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"embkern {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="show it and exit")
    ] = False,
) -> None:
    """Compress the token embeddings of Transformer models."""


@app.command()
def compress(
    model: Model,
    output: Output,
    ratio: Annotated[
        float | None, typer.Option(help="bytes of the table over bytes of what replaces it")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="width of the codes, instead of a ratio")] = None,
    method: Annotated[
        str | None, typer.Option(help="allocate (default), direction, autoencoder or svd")
    ] = None,
    lm_head: Annotated[
        str | None,
        typer.Option(help="a tied head: factorized (default) shares the small table, dense keeps its own"),
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
    floor: Annotated[float | None, typer.Option(help="allocate: least cosine of any row")] = None,
    exponent: Annotated[
        float | None, typer.Option(help="allocate, direction: rows weigh their frequency to this power")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="autoencoder: passes over the table")] = None,
    batch_size: Annotated[int | None, typer.Option(help="autoencoder: rows per step")] = None,
    lr: Annotated[float | None, typer.Option(help="autoencoder: Adam's learning rate")] = None,
    init: Annotated[str | None, typer.Option(help="autoencoder: random or svd")] = None,
    activation: Annotated[str | None, typer.Option(help="autoencoder: elu")] = None,
    center: Annotated[
        bool | None, typer.Option("--center", help="svd: PCA with a mean; direction: with an offset")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="of the method")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="autoencoder: file to go on from after a kill")
    ] = None,
    log: Annotated[Path | None, typer.Option(help="autoencoder: JSON lines, one per epoch")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Compress a model's token embeddings and save the result."""
    from . import api
    from .recipe import Recipe

    flags = {
        "epochs": epochs, "batch_size": batch_size, "lr": lr, "init": init, "activation": activation,
        "center": center, "seed": seed, "floor": floor, "exponent": exponent,
    }  # fmt: skip
    fields = {"method": method, "ratio": ratio, "rank": rank, "lm_head": lm_head}
    parsed = _recipe(Recipe, recipe, fields, flags)
    report = api.compress(
        model, recipe=parsed, counts=counts, count_text=count_text, text=text,
        output=output, overwrite=overwrite, checkpoint=checkpoint, log=log,
    )  # fmt: skip
    if as_json:
        print_json(report)
    else:
        print_comparison(report, f"{model} -> {output}")
        for name, size in report.other_tables.items():
            typer.echo(f"left alone: {name}, {size:,} bytes, is another embedding table", err=True)


def _recipe(
    kind: type[Recipe], file: Path | None, fields: dict[str, Any], flags: dict[str, Any], **defaults: Any
) -> Recipe:
    """Build a recipe from a file and from what was given on the command line."""
    given = {name: value for name, value in fields.items() if value is not None}
    options = {name: value for name, value in flags.items() if value is not None}
    if file is None:
        return kind.parse(**{**defaults, **given}, options=options)
    return kind.from_yaml(file, defaults, **given, options=options)


@app.command()
def train(
    table: Annotated[Path, typer.Argument(help="a safetensors file", metavar="TABLE")],
    tensor: Annotated[str, typer.Option(help="name of the table (V, H) in it")],
    output: Annotated[Path, typer.Option("--output", "-o", help="safetensors file of the factors to write")],
    ratio: Annotated[
        float | None, typer.Option(help="bytes of the table over bytes of what replaces it")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="width of the codes, instead of a ratio")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file; flags override it")] = None,
    epochs: Annotated[int | None, typer.Option(help="passes over the table")] = None,
    batch_size: Annotated[int | None, typer.Option(help="rows per step; V or more: the whole table")] = None,
    lr: Annotated[float | None, typer.Option(help="Adam's learning rate")] = None,
    init: Annotated[str | None, typer.Option(help="random or svd")] = None,
    activation: Annotated[str | None, typer.Option(help="elu")] = None,
    seed: Annotated[int | None, typer.Option(help="of the weights and the order of rows")] = None,
    engine: Annotated[str | None, typer.Option(help="what takes the steps: native, graph or torch")] = None,
    device: Annotated[str | None, typer.Option(help="such as cpu or cuda (default: cuda if there)")] = None,
    shards: Annotated[
        int | None, typer.Option(help="cut the table into as many; the last bits depend on it (torchrun: 8)")
    ] = None,
    timeout: Annotated[float, typer.Option(help="torchrun: seconds until a silent process is lost")] = 60.0,
    checkpoint: Annotated[Path | None, typer.Option(help="file to go on from after a kill")] = None,
    checkpoint_seconds: Annotated[float, typer.Option(help="least time between two checkpoints")] = 5.0,
    log: Annotated[Path | None, typer.Option(help="JSON lines, one per epoch")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a file that is there")] = False,
    as_json: AsJson = False,
) -> None:
    """Train the autoencoder on a table in a file, larger than memory or not, on one process or torchrun's."""
    from .recipe import Recipe
    from .train import train

    flags = {
        "epochs": epochs, "batch_size": batch_size, "lr": lr, "init": init, "activation": activation,
        "seed": seed,
    }  # fmt: skip
    parsed = _recipe(Recipe, recipe, {"ratio": ratio, "rank": rank}, flags, method="autoencoder")
    done = train(
        table, tensor, parsed, output,
        overwrite=overwrite, device=device, shards=shards, timeout=timeout, log=log,
        checkpoint=checkpoint, checkpoint_seconds=checkpoint_seconds, engine=engine,
    )  # fmt: skip
    if done is None:  # the first process reports
        return
    if as_json:
        print_json(done)
        return
    facts = Table(title=escape(f"{table} -> {output}"), show_header=False)
    for name, value in done.rows().items():
        facts.add_row(name, value)
    console().print(facts)


@app.command()
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
    errors: Annotated[str, typer.Option(help="bytes that are not UTF-8 text: strict or replace")] = "strict",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a file that is there")] = False,
    as_json: AsJson = False,
) -> None:
    """Count how often a model's tokenizer reads each token of some text."""
    from .frequencies import count_files

    summary = count_files(model, text, output, errors=errors, overwrite=overwrite)
    if as_json:
        print_json(summary)
        return
    facts = Table(title=escape(f"{', '.join(text)} -> {output}"), show_header=False)
    for name, value in summary.rows().items():
        facts.add_row(name, escape(value))
    console().print(facts)


@app.command()
def inspect(model: Model, as_json: AsJson = False) -> None:
    """Show a model's embedding table: size, ties, scale, and what each rank would save."""
    from . import inspection

    summary = inspection.inspect(model)
    if as_json:
        print_json(summary)
        return
    facts = Table(title=escape(model), show_header=False)
    for name, value in summary.facts().items():
        facts.add_row(name, value)
    console().print(facts)
    if summary.ranks:
        ranks = Table("rank", "bytes of the factors", "ratio", "whole model", title="what a rank saves")
        for each in summary.ranks:
            ranks.add_row(
                str(each.rank), f"{each.factors_bytes:,}", f"{each.ratio:.2f}x", f"-{each.model_share:.1%}"
            )
        console().print(ranks)


@app.command(cls=ManyValues)
def compare(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="directory of the report, and of what it goes on from")
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
    max_tokens: Annotated[int | None, typer.Option(help="of the data set that are read")] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens that a language model reads at once")] = None,
    stride: Annotated[int | None, typer.Option(help="causal: tokens by which it goes on")] = None,
    separator: Annotated[
        str | None, typer.Option(help="causal, between texts: newline (default) or eos")
    ] = None,
    line_filter: Annotated[str | None, typer.Option(help="masked: authors, the paper's")] = None,
    text: Text = None,
    counts: Annotated[
        Path | None, typer.Option(help="token frequencies: a file that `embkern count` wrote")
    ] = None,
    count_text: Annotated[
        list[str] | None, typer.Option(help="text to count token frequencies in: file, directory or data set")
    ] = None,
    words: Annotated[list[str] | None, typer.Option(help="list the nearest neighbours of these")] = None,
    device: Annotated[str | None, typer.Option(help="such as cuda; the CPU by default")] = None,
    seed: Annotated[int, typer.Option(help="of methods that draw, and of what is sampled")] = 0,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="save the compressed models")] = False,
    row: Annotated[
        str | None, typer.Option(help="measure one row again, and print it; the report is left alone")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="measure again what is there")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare methods at several ratios, and write one report; goes on where it was interrupted.

    Options that name several take them in a row: --ratios 5 10 --methods svd allocate:floor=0.5
    """
    from . import study

    given = {
        "ratios": ratios, "methods": methods, "dataset": dataset, "max_tokens": max_tokens,
        "max_length": max_length, "stride": stride, "separator": separator, "line_filter": line_filter,
        "text": text, "counts": counts, "count_text": count_text, "words": words, "device": device,
        "seed": seed, "keep_models": keep_models,
    }  # fmt: skip
    asked: dict[str, Any] = {name: value for name, value in given.items() if value not in (None, [])}
    if row is not None:
        print_json(study.compare_row(model, row, output=output, **asked))
        return
    done = study.compare(model, output=output, overwrite=overwrite, **asked)
    if as_json:
        print_json(done)
    else:
        print(f"{done.measured} of {len(done.rows)} rows measured in {done.seconds:g} s -> {done.page}")


@app.command()
def export(
    directory: Annotated[str, typer.Argument(help="a compressed model", metavar="DIR")],
    output: Output,
    format: Annotated[str, typer.Option(help="dense: an ordinary model that needs no embkern")] = "dense",
    overwrite: Overwrite = False,
) -> None:
    """Turn a compressed model into an ordinary one."""
    from . import api

    if format != "dense":
        raise ValueError(f"format: expected dense, got {format!r}")
    api.export_dense(directory, output, overwrite=overwrite)
    print(f"{directory} -> {output} (dense)")


@app.command()
def env(as_json: AsJson = False) -> None:
    """Show versions, and which backend serves each op here and why."""
    from . import inspection

    facts = inspection.environment()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, str(value))
    console().print(table)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="directory of the compressed models")] = Path(
        "demo-output"
    ),
    ratio: Annotated[float, typer.Option(help="bytes of the table over bytes of what replaces it")] = 5.0,
    epochs: Annotated[int, typer.Option(help="of the autoencoder; the paper's authors train 30")] = 30,
) -> None:
    """Compress all-MiniLM-L6-v2 with SVD and with the paper's autoencoder, reload both, and compare."""
    from .demo import run

    run(output, ratio=ratio, epochs=epochs, console=console())


def main() -> None:
    """Run the command line; an error that a user can mend is one line on stderr and exit code 1."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars follow it too
    try:
        app()
    except (ValueError, TypeError, LookupError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("EMBKERN_DEBUG"):
            raise
        if not getattr(error, "told_by_the_first", False):
            typer.echo(f"embkern: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

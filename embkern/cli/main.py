"""The command line. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from .._version import __version__
from .calibrate import calibrate
from .compare import compare
from .compress import compress
from .console import ManyValues, own_warnings
from .convert import convert
from .count import count
from .demo import demo
from .evaluate import app as evaluate_app
from .export import export
from .fisher import fisher
from .inspect import env, inspect
from .restore import restore
from .train import train

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(compress)
app.command()(train)
app.command()(count)
app.command(cls=ManyValues)(calibrate)
app.command(cls=ManyValues)(fisher)
app.command()(inspect)
app.add_typer(evaluate_app, name="evaluate")
app.command(cls=ManyValues)(compare)
app.command()(export)
app.command()(restore)
app.command()(convert)
app.command()(env)
app.command()(demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"embkern {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Compress the token embeddings of Transformer models."""


def main() -> None:
    """Run the command line; an expected error is one line on stderr and exit code 1."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars follow it too
    try:
        with own_warnings():
            app()
    except (ValueError, TypeError, LookupError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("EMBKERN_DEBUG"):
            raise
        if not getattr(error, "reported_by_first_process", False):
            typer.echo(f"embkern: {error}", err=True)
        sys.exit(1)

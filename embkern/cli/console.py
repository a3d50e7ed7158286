"""Common arguments of the commands, and printing of results to stdout."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

from ..io.errors import EmbkernWarning

if TYPE_CHECKING:
    from ..models.report import Comparison

Model = Annotated[str, typer.Argument(help="a model directory, or a name on the hub", metavar="MODEL")]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="directory to write; it is complete or does not exist")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an existing saved model")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
Text = Annotated[
    Path | None,
    typer.Option("--text", help="a text file, one sentence per line, whose sentence embeddings are compared"),
]


NARROW = 80  # columns that every terminal has


@contextlib.contextmanager
def own_warnings() -> Iterator[None]:
    """Print embkern's own warnings in the block as one line each, without the place in its code."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Any, category: Any, filename: str, *others: Any, **named: Any) -> None:
            if issubclass(category, EmbkernWarning):
                typer.echo(f"embkern: warning: {message}", err=True)
            else:
                shown(message, category, filename, *others, **named)

        warnings.showwarning = show
        yield


class ManyValues(TyperCommand):
    """A command whose repeatable options also take several values in a row: ``--seeds 22 23 24``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the name of a repeatable option before each of its values."""
        repeatable = {name for each in self.params if getattr(each, "multiple", False) for name in each.opts}
        repeated: list[str] = []
        option = None
        for arg in args:
            if arg.startswith("-"):
                option = arg if arg in repeatable else None
            elif option is not None and repeated[-1] != option:
                repeated.append(option)
            repeated.append(arg)
        return super().parse_args(ctx, repeated)


def console(width: int | None = None) -> Console:
    """Return a console on stdout, as wide as a terminal, or else 120 columns (rich's default is 80)."""
    return Console(width=width or (None if sys.stdout.isatty() else 120), highlight=False)


def print_json(model: BaseModel) -> None:
    """Print a result as JSON."""
    print(model.model_dump_json(indent=2))


def print_rows(rows: Mapping[str, str], title: str | None = None) -> None:
    """Print names and values as a table."""
    table = Table(title=None if title is None else escape(title), show_header=False)
    for name, value in rows.items():
        table.add_row(escape(name), escape(value))
    console().print(table)


def print_comparison(comparison: Comparison, title: str) -> None:
    """Print a comparison in 80 columns: sizes before and after, figures, and the tokens of the worst rows."""
    narrow = console(NARROW)
    sizes = Table("bytes", "before", "after", "", title=escape(title))
    for size in comparison.sizes():
        sizes.add_row(escape(size.name), f"{size.before:,}", f"{size.after:,}", size.change)
    narrow.print(sizes)
    table = Table(show_header=False)
    for name, value in comparison.figures().items():
        table.add_row(escape(name), escape(value))
    narrow.print(table)
    narrow.print(f"worst rows: {', '.join(map(str, comparison.table.worst_rows))}", markup=False)

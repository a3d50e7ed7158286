"""The commands of ``embkern evaluate``."""

from __future__ import annotations

from typing import Annotated

import typer

from ..console import AsJson, Text, print_comparison, print_json

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

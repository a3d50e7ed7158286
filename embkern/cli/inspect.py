"""``embkern inspect`` and ``embkern env``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .console import AsJson, Model, console, print_comparison, print_json, print_rows


def inspect(
    model: Model,
    plot: Annotated[
        Path | None,
        typer.Option(help="draw the bits that a packed table spends on each token, to a .png or .svg file"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a model's embedding table.

    Of a dense model: size, ties, scale, and the bytes that each rank would save. Of a compressed one: the
    rows and bytes of each tier, and what was reported when it was compressed: calibration, errors, worst
    rows.
    """
    from .. import inspection

    summary = inspection.inspect(model, plot=plot)
    if as_json:
        print_json(summary)
        return
    print_rows(summary.facts(), model)
    if (report := summary.report) is not None:
        print_comparison(report, f"compressed from {report.source}, {report.created}")
    if summary.ranks:
        ranks = Table("rank", "bytes of the factors", "ratio", "whole model", title="what a rank saves")
        for each in summary.ranks:
            size, share = f"{each.compressed_bytes:,}", f"-{each.model_share:.1%}"
            ranks.add_row(str(each.rank), size, f"{each.ratio:.2f}x", share)
        console().print(ranks)


def env(as_json: AsJson = False) -> None:
    """Show versions, and for each op the backend in use and why the others are not."""
    from ..environment import environment

    facts = environment()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    print_rows(facts)

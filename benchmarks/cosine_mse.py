"""cosine_mse_loss beside plain torch: latency, share of the machine's bound, peak memory.

The rivals are the plain formula (F.cosine_similarity and F.mse_loss), and a form with three dot products per
row (y.x, y.y, x.x), which leaves a compiler the least to do; both eager and compiled, the latter also with
the targets' squared norms computed beforehand (``-norm``), as a trainer on a constant table has them.

A provider is timed only after its check: the errors of loss and gradient against float64 are at most twice
those of the eager three-dot form, which sums 16-bit rows in fp32; rivals may be less exact. Providers are
timed in paired rounds, on several batches that together exceed the caches. A speed-up is the median over
rounds of the ratio within a round.

gbps is the least traffic over the median time: output and target are read, and the gradient is written in
the mode ``both``: 2 or 3 times N H elements. share is the time of that traffic at the measured copy bandwidth
over the median; small cases stay in cache and can exceed 1. Every provider allocates its gradient at each
call.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from typing import Any

import torch

from embkern.experiments.timing import paired_ratio, sampler, side_stream, speedups

from .losses import COMPILED, PROVIDERS, TERMS, Batch, Check, mode_call
from .machine import copy_bandwidth
from .peers import BOTH, FORWARD
from .runner import DTYPES, Bench, Prepared, Selection, option_parser, parse, selected, table_line

MODES = (FORWARD, BOTH)
BATCHES = 8
KEPT_BYTES = 2**28  # of outputs and targets, unless two batches need more
MIN_PEAK_GRADIENT = 2**20  # a smaller gradient is below the granularity of the resident set


@dataclass(frozen=True)
class Cell:
    """What is measured: one loss on rows of one shape and dtype, without or with its gradient."""

    terms: str
    N: int
    H: int
    dtype: str
    mode: str


_SHAPES = ["32x384", "32x768", "512x768", "4096x768", "30522x384", "30522x768"]
_MAIN: Selection = dict(terms=["cosine+mse"], shapes=_SHAPES, dtypes=["fp32", "bf16"], modes=list(MODES))
_AUTHORS: Selection = dict(
    terms=["cosine+power"], shapes=["32x384", "4096x768", "30522x768"], dtypes=["fp32"], modes=[BOTH]
)
_GPU: Selection = _MAIN | dict(shapes=[*_SHAPES, "128256x2048"], dtypes=["fp32", "bf16", "fp16"])
DEFAULT = {"cpu": [_MAIN, _AUTHORS], "cuda": [_GPU, _AUTHORS]}
QUICK = {
    "cpu": [_MAIN | dict(shapes=["32x768", "4096x768", "30522x768"], dtypes=["fp32"], modes=[BOTH])],
    "cuda": [
        _MAIN | dict(shapes=["32x768", "4096x768", "30522x768", "128256x2048"], modes=[BOTH]),
        _AUTHORS | dict(shapes=["30522x768"]),
    ],
}


def main(arguments: list[str]) -> None:
    """Measure every cell, print one line each, then the speed-ups of embkern; exit 1 if a provider failed."""
    options = _parse(arguments)
    bench = CosineMSE("cosine_mse", arguments, options)
    with side_stream(options.device):
        bench.run(plan(options))
    print_speedups(bench.rows)
    bench.finish()


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = option_parser("cosine_mse", __doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", help="NxH; what is not given keeps its default selection")
    add("--terms", nargs="+", choices=TERMS)
    add("--dtypes", nargs="+", choices=DTYPES)
    add("--modes", nargs="+", choices=MODES)
    return parse(parser, arguments, PROVIDERS, seconds={"cpu": (2.0, 0.5), "cuda": (0.5, 0.2)})


def plan(options: argparse.Namespace) -> list[Cell]:
    """Return the cells: the default selections, with what the options give in place of theirs."""
    cells: dict[Cell, None] = {}
    for chosen, _ in selected(options, (QUICK if options.quick else DEFAULT)[options.device]):
        for parts in itertools.product(*(chosen[key] for key in ("terms", "dtypes", "shapes", "modes"))):
            terms, dtype, shape, mode = parts
            N, H = map(int, shape.split("x"))
            cells.setdefault(Cell(terms, N, H, dtype, mode))
    return list(cells)


class CosineMSE(Bench):
    """Runs cells and keeps their rows."""

    def __init__(self, name: str, arguments: list[str], options: argparse.Namespace) -> None:
        super().__init__(name, arguments, options)
        self.names = [
            name for name in options.providers or PROVIDERS if not (options.no_compile and name in COMPILED)
        ]
        self.bandwidth = copy_bandwidth(options.device)
        self.facts = {"copy_gbps": round(self.bandwidth, 2)}
        print(f"copy bandwidth {self.bandwidth:.1f} GB/s (reads plus writes)")

    def run(self, cells: list[Cell]) -> None:
        """Measure every cell; the results file is written after each."""
        heading: tuple[str, str] | None = None
        for cell in self.before_deadline(cells, "cells"):
            names = self._available(cell)
            if heading != (cell.terms, cell.dtype):
                heading = (cell.terms, cell.dtype)
                print(f"\nmedian us\n{table_line(' '.join(heading), {n: n for n in names}, names)}")
            self._run_cell(cell, names)
            self.write()

    def _available(self, cell: Cell) -> list[str]:
        dtype = DTYPES[cell.dtype]
        return self.available(
            self.names,
            lambda name: PROVIDERS[name].reason(self.options.device, dtype),
            label=lambda name: name if name == "liger" else f"{name} {dtype}",
        )

    def _run_cell(self, cell: Cell, names: list[str]) -> None:
        device, dtype, terms = self.options.device, DTYPES[cell.dtype], TERMS[cell.terms]
        torch._dynamo.reset()
        gradient_bytes = cell.N * cell.H * dtype.itemsize
        count = max(2, min(BATCHES, KEPT_BYTES // (2 * gradient_bytes)))
        batches = [Batch.random(cell.N, cell.H, dtype, device, seed) for seed in range(count)]

        def prepare(name: str) -> Prepared:
            loss = PROVIDERS[name].build(terms)
            error = check(loss, PROVIDERS[name].rival)
            calls = [mode_call(cell.mode, loss, batch) for batch in batches]
            sample, timer = sampler(device, calls)
            facts = {"error": error, "timer": timer}
            return Prepared(sample, facts, calls[0] if gradient_bytes >= MIN_PEAK_GRADIENT else None)

        with torch.set_grad_enabled(cell.mode != FORWARD):
            check = Check(batches[0], cell.mode, terms)
            measured = self.measure(str(cell), names, prepare)
        passes = 2 if cell.mode == FORWARD else 3
        rivals = [each for each in measured.times if not each.startswith("embkern")]
        for name in measured.times:
            figures, peak = measured.figures(name), measured.peaks.get(name)
            gbps = passes * gradient_bytes / figures["p50"] / 1e3
            self.rows.append(
                {
                    "op": "cosine_mse",
                    "provider": name,
                    **vars(cell),
                    "device": device,
                    **figures,
                    "gbps": round(gbps, 3),
                    "share": round(gbps / self.bandwidth, 4),
                    **speedups(measured.times, name, PROVIDERS[name].baselines),
                    "times_as_fast_as": {each: paired_ratio(measured.times, each, name) for each in rivals},
                    "peak_bytes": peak,
                    "peak_over_gradient": None if peak is None else round(peak / gradient_bytes, 3),
                }
            )
        if measured.times:
            print(measured.line(f"{cell.mode:9}{cell.N} x {cell.H}", names), flush=True)


def print_speedups(rows: list[dict[str, Any]]) -> None:
    """Print how many times as fast embkern is as the faster three-dot form, and its share of the bound."""
    ours = [row for row in rows if row["provider"] in ("embkern", "embkern-norm") and row["speedup"]]
    if not ours:
        return
    print("\nembkern against the faster three-dot form of what is known alike (above 1 is faster)")
    for row in ours:
        case = f"{row['terms']:14}{row['dtype']:6}{row['mode']:9}{row['N']} x {row['H']}"
        print(
            f"{case:46}{row['provider']:14}{row['speedup']:>6.2f} x {row['baseline']:26}"
            f"{row['share']:>7.1%} of the copy bandwidth"
        )

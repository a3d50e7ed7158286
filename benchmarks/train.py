"""Training the autoencoder beside plain-torch loops: time per step, share of the GEMM floor, peak memory.

The plain loop has two ``nn.Linear``, F.cosine_similarity and the other terms, fused Adam, and no ``.item()``
in a step; eager and compiled, on one thread and on all. ``embkern`` is what ``embkern.methods.autoencoder``
runs, ``embkern-NAME`` one of its engines, ``embkern-loss`` a plain loop around ``autoencoder_loss``. The
terms are the authors' (cosine and power) or cosine and squared error.

A loop is timed only after its check: from the same start, the errors of its first losses and weights against
float64 are at most about twice those of the plain loop in fp32. Loops are timed in paired rounds, in slices
of up to some hundred steps. A speed-up is the median over rounds of the ratio within a round, against the
fastest plain loop.

share is the time of the five products of a step (encode, decode, gradients of codes, basis and encoder: 5
times 2 B H r flops) at the measured fp32 rate of a large square product on as many threads, over the median.
A step with cosine and squared error can do with four of them. peak_bytes, of steps on the whole table, is how
far memory rises beyond the table, weights and Adam's state included.

``--full`` also runs the authors' whole recipe: seconds, and mean(1 - cos) over the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from embkern.experiments.timing import Sample, paired_ratio, speedups, synchronize
from embkern.methods.autoencoder.graph import GRAPH_STEPS

from .losses import TERMS
from .machine import gemm_peak, peak_bytes, using_threads
from .results_file import ROOT
from .runner import Bench, Prepared, Selection, option_parser, parse, selected
from .training_check import Check, ids_of_steps
from .training_loops import LR, PROVIDERS, TABLES, Loop, Table, reconstruction, table_rows
from .training_recipe import run_whole_recipe

WARM_ROWS = 64
SLICE_SECONDS = 0.25
MAX_SLICE_STEPS = 16 * GRAPH_STEPS
FULL = "full"


@dataclass(frozen=True)
class Cell:
    """What is measured: steps on batches of a table; ``batch`` None is the whole table."""

    table: str
    terms: str
    batch: int | None

    @property
    def batch_size(self) -> int:
        """Rows per step."""
        return self.batch or TABLES[self.table].V


_RECIPE: Selection = dict(
    tables=["minilm", "bert-base"], terms=["cosine+power"], batches=["32", "512", "4096", FULL]
)
_LINEAR: Selection = _RECIPE | dict(terms=["cosine+mse"], batches=[FULL])
DEFAULT = [_RECIPE, _LINEAR]
QUICK = [_RECIPE | dict(tables=["minilm"], batches=["32", FULL]), _LINEAR | dict(tables=["minilm"])]


def main(arguments: list[str]) -> None:
    """Measure every cell, print a line per loop, then embkern's figures; exit 1 if a loop failed."""
    options = _parse(arguments)
    if options.peak_of:
        torch.set_num_threads(options.threads or torch.get_num_threads())
        print(json.dumps(_peak(options.peak_of, plan(options)[0], options.device)))
        return
    bench = Train("train", arguments, options)
    bench.run(plan(options))
    if options.full:
        for name in dict.fromkeys(cell.table for cell in plan(options)):
            run_whole_recipe(bench, name, bench.threads, options.epochs)
    print_summary(bench.rows)
    bench.finish()


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = option_parser("train", __doc__)
    add = parser.add_argument
    add("--tables", nargs="+", choices=TABLES, help="what is not given keeps its default selection")
    add("--terms", nargs="+", choices=TERMS)
    add("--batches", nargs="+", help="rows per step, or `full` for the whole table")
    add("--full", action="store_true", help="run the authors' recipe to its end, too")
    add("--epochs", type=int, help="of `--full`; default: the recipe's 30")
    add("--peak-of", choices=PROVIDERS, help=argparse.SUPPRESS)  # in a process of its own
    return parse(
        parser,
        arguments,
        PROVIDERS,
        seconds={"cpu": (20.0, 5.0), "cuda": (10.0, 2.0)},
        limits=(2400.0, 240.0),
    )


def plan(options: argparse.Namespace) -> list[Cell]:
    """Return the cells: the default selections, with what the options give in place of theirs."""
    cells: dict[Cell, None] = {}
    for chosen, _ in selected(options, QUICK if options.quick else DEFAULT):
        for table, terms, batch in itertools.product(
            *(chosen[key] for key in ("tables", "terms", "batches"))
        ):
            cells.setdefault(Cell(table, terms, None if batch == FULL else int(batch)))
    return list(cells)


class Train(Bench):
    """Runs cells and keeps their rows."""

    def __init__(self, name: str, arguments: list[str], options: argparse.Namespace) -> None:
        super().__init__(name, arguments, options)
        self.names = [
            name
            for name in options.providers or PROVIDERS
            if not (options.no_compile and PROVIDERS[name].compiled)
        ]
        all_threads = torch.get_num_threads()
        self.threads = sorted({1, all_threads}) if options.device == "cpu" else [all_threads]
        self.gemm = {}
        for threads in self.threads:
            with using_threads(threads):
                self.gemm[threads] = gemm_peak(torch.float32, options.device)
        self.facts = {"gemm_gflops": {str(n): round(rate, 1) for n, rate in self.gemm.items()}}
        rates = ", ".join(f"{rate:.0f} on {n} thread(s)" for n, rate in self.gemm.items())
        print(f"fp32 product, GFLOP/s: {rates}")

    def run(self, cells: list[Cell]) -> None:
        """Measure every cell; the results file is written after each."""
        for cell in self.before_deadline(cells, "cells"):
            rows, reason = table_rows(cell.table, self.options.device)
            if reason:
                self.missing(cell.table, reason)
            self._run_cell(cell, rows)
            self.write()

    def _run_cell(self, cell: Cell, rows: Tensor) -> None:
        device, table = self.options.device, TABLES[cell.table]
        torch._dynamo.reset()
        reconstruction.cache_clear()
        print(
            f"\n{cell.table} {table.V} x {table.H}, r = {table.r}, {cell.terms}, batch {cell.batch or FULL}"
        )
        check = Check(rows, table, TERMS[cell.terms], cell.batch_size)
        loops = {
            f"{name}@{threads}": (name, threads)
            for name, threads in itertools.product(self._available(cell), self.threads)
        }

        def prepare(key: str) -> Prepared:
            name, threads = loops[key]
            with using_threads(threads):
                loop = PROVIDERS[name].build(rows, table, TERMS[cell.terms], cell.batch_size)
                error = check(loop)
                take, steps = slicer(loop, cell, threads, device)
            facts = {"provider": name, "threads": threads, "error": error, "slice_steps": steps}
            return Prepared(take, facts | {"timer": "perf_counter"})

        measured = self.measure(str(cell), loops, prepare)
        if not measured.times:
            return
        peaks = self._peaks(cell, rows) if cell.batch is None else {}
        times = measured.times
        baselines = [key for key in times if PROVIDERS[loops[key][0]].plain]
        flops = 5 * 2 * cell.batch_size * table.H * table.r
        for key in times:
            figures, (name, threads) = measured.figures(key), loops[key]
            row = {
                "op": "train",
                "table": cell.table,
                "terms": cell.terms,
                "batch": cell.batch_size,
                "V": table.V,
                "H": table.H,
                "r": table.r,
                "device": device,
                **figures,
                "steps_per_second": round(1e6 / figures["p50"], 2),
                "rows_per_second": round(1e6 * cell.batch_size / figures["p50"], 1),
                "share": round(flops / self.gemm[threads] / 1e3 / figures["p50"], 4),
                **speedups(times, key, baselines),
                "times_as_fast_as": {each: paired_ratio(times, each, key) for each in baselines},
                "peak_bytes": peaks.get(name),
            }
            self.rows.append(row)
            print(_line(row), flush=True)

    def _available(self, cell: Cell) -> list[str]:
        names = [name for name in self.names if not (PROVIDERS[name].full_only and cell.batch is not None)]
        return self.available(names, lambda name: PROVIDERS[name].reason(self.options.device))

    def _peaks(self, cell: Cell, rows: Tensor) -> dict[str, int | None]:
        """Return the peak of every provider beyond the table; on the CPU, each in a new process."""
        peaks: dict[str, int | None] = {}
        for name in self.before_deadline(self._available(cell), f"peaks of {cell}"):
            with self.recorded(name, f"{cell}, peak memory"):
                if self.options.device == "cuda":
                    peaks[name] = _peak(name, cell, "cuda", rows)
                    continue
                command = [sys.executable, "-m", "benchmarks", "train", "--device", "cpu", "--peak-of", name]
                command += ["--tables", cell.table, "--terms", cell.terms, "--batches", FULL]
                command += ["--threads", str(self.threads[-1])]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                assert done.returncode == 0, (done.stderr.strip().splitlines() or ["no output"])[-1]
                peaks[name] = json.loads(done.stdout.splitlines()[-1])
        return peaks


def slicer(loop: Loop, cell: Cell, threads: int, device: str) -> tuple[Sample, int]:
    """Return a function that times the next slice of steps, in microseconds per step, and its steps."""
    V, seeds = TABLES[cell.table].V, itertools.count()

    def timed(steps: int) -> float:
        order = ids_of_steps(V, cell.batch_size, steps, next(seeds))
        with using_threads(threads):
            synchronize(device)
            start = time.perf_counter()
            loop.run(order, TERMS[cell.terms].alpha, LR)
            synchronize(device)
            return (time.perf_counter() - start) * 1e6 / steps

    def fitting(microseconds: float) -> int:
        steps = max(1, min(MAX_SLICE_STEPS, round(SLICE_SECONDS * 1e6 / microseconds)))
        return steps - steps % GRAPH_STEPS if steps > GRAPH_STEPS else steps

    timed(1)
    steps = fitting(timed(1))
    timed(steps)  # captures a graph, where there is one
    steps = fitting(timed(steps))
    return lambda: timed(steps), steps


def _peak(name: str, cell: Cell, device: str, rows: Tensor | None = None) -> int | None:
    """Return the peak of a few steps beyond the table they run on: loop, weights and Adam's state included.

    Steps before load the code: on a few rows, or, of a compiled loop, on all of them.
    """
    table, provider, terms = TABLES[cell.table], PROVIDERS[name], TERMS[cell.terms]
    if reason := provider.reason(device):
        raise RuntimeError(reason)
    if rows is None:
        rows = table_rows(cell.table, device)[0]

    steps = GRAPH_STEPS if device == "cuda" else 2

    def train(rows: Tensor) -> None:
        loop = provider.build(rows, Table(len(rows), table.H, table.r), terms, len(rows))
        loop.run(torch.arange(len(rows)).repeat(steps), terms.alpha, LR)

    train(rows if provider.compiled else rows[:WARM_ROWS].clone())
    return peak_bytes(lambda: train(rows), device)


def _line(row: dict[str, Any]) -> str:
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:>9.1f} MB beyond the table"
    speedup = "" if row["speedup"] is None else f"{row['speedup']:>7.2f} x {row['baseline']}"
    return (
        f"{row['provider']:20}{row['threads']:>3} thread(s){row['p50']:>12.1f} us/step"
        f"{row['rows_per_second']:>12.0f} rows/s{row['share']:>8.1%} of the floor{speedup}{peak}"
    )


def print_summary(rows: list[dict[str, Any]]) -> None:
    """Print embkern's best of every cell against the fastest plain loop, and memory against the leanest."""
    cells: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if row["op"] == "train":
            cells.setdefault((row["table"], row["terms"], row["batch"]), []).append(row)
    if cells:
        print(
            "\nembkern against the fastest plain loop (above 1 is faster); its peak against the leanest one's"
        )
    for (table, terms, batch), found in cells.items():
        ours = [row for row in found if row["provider"] == "embkern" and row["speedup"]]
        if not ours:
            continue
        best = max(ours, key=lambda row: row["speedup"])
        line = f"{table:12}{terms:14}batch {batch:<7}{best['speedup']:>7.2f} x {best['baseline']:22}"
        line += f"{best['share']:>7.1%} of the floor"
        peaks = [row["peak_bytes"] for row in found if PROVIDERS[row["provider"]].plain and row["peak_bytes"]]
        if peaks and best["peak_bytes"] is not None:
            line += f"   peak {best['peak_bytes'] / min(peaks):.2f} of {min(peaks) / 1e6:.1f} MB"
        print(line)
    whole = [row for row in rows if row["op"] == "train_whole" and row["provider"] == "embkern"]
    for row in whole:
        if row["speedup"]:
            print(f"{row['table']:12}the whole recipe          {row['speedup']:>8.2f} x")

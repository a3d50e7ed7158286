"""gather_project beside what a user could run instead: latency, share of the machine's bound, peak memory.

A provider is timed only after its check: its error against float64 is at most twice that of two steps in
plain torch (a dense or quantised table is checked against its own rows). Providers are timed in paired
rounds, and every round uses other ids. A speed-up is the median over rounds of the ratio within a round.

The figures are relative to the least work of any method, with U distinct ids among N:

    forward   bytes = ids + (U r + r H + H + N H) s              flops = 2 U r H
    backward  bytes = ids + (N H + U r + r H + V r + r H + H) s  flops = 4 U r H
    both      their sum; a sparse gradient writes U r in place of V r
    a dense table moves U rows as wide as it keeps them and V H for their gradient, and has no flops

with s bytes per element. gbps and gflops are these over the median time; share is the time that the machine
needs at its measured copy bandwidth or product rate, whichever is longer, over the median. Small cases sit in
cache and can pass 1.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embkern.experiments.timing import sampler, side_stream, speedups

from .lookup_check import Check, mode_call
from .machine import copy_bandwidth, gemm_peak
from .peers import BACKWARD, FORWARD, MODES, PROVIDERS, Lookup, Problem
from .runner import DTYPES, Bench, Prepared, Selection, option_parser, parse, selected, table_line
from .shapes import COUNTS, MODELS, SENTENCES, STREAMS, UnavailableError, id_sets

ID_SETS = 8
KEPT_BYTES = 2**28  # the backward mode may keep outputs of this size alive per provider
MIN_PEAK_OUTPUT = 2**20  # a smaller output is below the granularity of the resident set

# The default selection: the paper's table in full, large vocabularies at three sizes.
_PAPER: Selection = dict(
    models=["bert-base"],
    ranks=[],
    counts=list(COUNTS),
    ids=["zipf", "uniform", "text"],
    dtypes=["fp32", "bf16"],
    modes=["forward"],
)
_TRAINING: Selection = _PAPER | dict(
    ranks=[149], counts=[128, 1024, 4096], ids=["zipf", "uniform"], modes=["backward", "both"]
)
_LARGE: Selection = dict(
    models=["gpt2", "llama-3-8b", "qwen3-0.6b", "gemma-3-1b"],
    ranks=[128, 151, 256, 512],
    counts=[1, 128, 4096],
    ids=["zipf", "uniform"],
    dtypes=["fp32", "bf16"],
    modes=["forward"],
)
DEFAULT = {
    "cpu": [_PAPER, _TRAINING, _LARGE],
    "cuda": [
        _PAPER,
        _TRAINING | dict(counts=[128, 4096, 16384], ids=["zipf"]),
        _LARGE | dict(counts=[1, 128, 4096, 65536], ids=["zipf"]),
    ],
}
QUICK = {
    "cpu": [
        _PAPER | dict(ranks=[149], counts=[1, 128, 4096], ids=["zipf", "uniform"]),
        _TRAINING | dict(counts=[1024]),
    ],
    "cuda": [
        _PAPER | dict(ranks=[149], counts=[1, 128, 4096, 16384], ids=["zipf"], dtypes=["bf16", "fp32"]),
        _TRAINING | dict(counts=[4096], dtypes=["bf16"]),
        _LARGE | dict(models=["llama-3-8b"], counts=[1, 128, 4096, 16384], dtypes=["bf16"]),
    ],
}


@dataclass(frozen=True)
class Table:
    """A table, for which the providers are built once."""

    model: str
    r: int
    dtype: str


@dataclass(frozen=True)
class Cell:
    """What is measured on a table: one mode, one number and kind of ids."""

    mode: str
    ids: str
    N: int


def main(arguments: list[str]) -> None:
    """Measure every cell, print one line each, then the speed-ups of embkern; exit 1 if a provider failed."""
    options = _parse(arguments)
    bench = GatherProject("gather_project", arguments, options)
    with side_stream(options.device):
        bench.run(plan(options))
    print_speedups(bench.rows)
    bench.finish()


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = option_parser("gather_project", __doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, help="what is not given keeps its default selection")
    add("--ranks", nargs="+", type=int)
    add("--counts", nargs="+", type=int, help="N, the numbers of ids")
    add("--ids", nargs="+", choices=STREAMS)
    add("--text", type=Path, default=SENTENCES, help="text file of the ids `text`, tokenised for bert-base")
    add("--dtypes", nargs="+", choices=DTYPES)
    add("--modes", nargs="+", choices=MODES)
    return parse(parser, arguments, PROVIDERS, seconds={"cpu": (2.0, 0.5), "cuda": (0.5, 0.2)})


def plan(options: argparse.Namespace) -> list[tuple[Table, list[Cell]]]:
    """Return the cells by table: the default selections, with what the options give in place of theirs."""
    tables: dict[Table, dict[Cell, None]] = {}
    for chosen, given in selected(options, (QUICK if options.quick else DEFAULT)[options.device]):
        for name, dtype in itertools.product(chosen["models"], chosen["dtypes"]):
            known = MODELS[name].ranks
            # Given ranks are taken for every model; those of a selection only where the model has them.
            ranks = given.get("ranks") or [r for r in chosen["ranks"] if r in known] or known
            for rank in ranks:
                cells = tables.setdefault(Table(name, rank, dtype), {})
                for mode, ids, count in itertools.product(chosen["modes"], chosen["ids"], chosen["counts"]):
                    cells.setdefault(Cell(mode, ids, count))
    return [(table, list(cells)) for table, cells in tables.items()]


class GatherProject(Bench):
    """Runs cells and keeps their rows."""

    def __init__(self, name: str, arguments: list[str], options: argparse.Namespace) -> None:
        super().__init__(name, arguments, options)
        self.names = [
            name
            for name in options.providers or PROVIDERS
            if not (options.no_compile and name == "two-step-compiled")
        ]
        self.bandwidth = copy_bandwidth(options.device)
        self.gemm: dict[str, float] = {}
        self.facts = {"copy_gbps": round(self.bandwidth, 2), "gemm_gflops": {}}
        print(f"copy bandwidth {self.bandwidth:.1f} GB/s (reads plus writes)")

    def run(self, tables: list[tuple[Table, list[Cell]]]) -> None:
        """Measure every cell; the results file is written after each table."""
        for table, cells in self.before_deadline(tables, "tables"):
            if table.dtype not in self.gemm:
                self.gemm[table.dtype] = gemm_peak(DTYPES[table.dtype], self.options.device)
                self.facts["gemm_gflops"][table.dtype] = round(self.gemm[table.dtype], 1)
                print(f"{table.dtype} product {self.gemm[table.dtype]:.0f} GFLOP/s")
            self._run_table(table, cells)
            self.write()

    def _run_table(self, table: Table, cells: list[Cell]) -> None:
        torch._dynamo.reset()
        problems = self._problems(table)
        lookups: dict[str, list[Lookup]] = {}
        needed = [n for n in self.names if any(cell.mode in PROVIDERS[n].modes for cell in cells)]
        for name in self.available(
            needed,
            lambda name: PROVIDERS[name].reason(self.options.device, DTYPES[table.dtype]),
            label=lambda name: f"{name} {table.dtype}",
        ):
            with self.recorded(name, f"{table}, build"):
                lookups[name] = [PROVIDERS[name].build(problem) for problem in problems]
        title = f"{table.model} r={table.r} {table.dtype}"
        print(f"\nmedian us\n{table_line(title, {name: name for name in lookups}, lookups)}")
        for cell in self.before_deadline(cells, f"cells of {title}"):
            try:
                sets = self._id_sets(table, cell)
            except UnavailableError as error:
                self.missing(f"{cell.ids} ids, {table.model}", str(error))
                continue
            self._run_cell(table, cell, problems, lookups, sets)

    def _problems(self, table: Table) -> list[Problem]:
        """Return copies of the table that exceed the GPU's L2 cache, so that codes come from memory."""
        model, dtype, device = MODELS[table.model], DTYPES[table.dtype], self.options.device
        copies = 1
        if device == "cuda":
            cache = torch.cuda.get_device_properties("cuda").L2_cache_size
            copies = min(ID_SETS, 1 + 2 * cache // (model.V * table.r * dtype.itemsize))
        return [Problem(model, table.r, dtype, device, seed) for seed in range(copies)]

    def _id_sets(self, table: Table, cell: Cell) -> list[Tensor]:
        count = ID_SETS
        if cell.mode == BACKWARD:
            rows = cell.N * MODELS[table.model].H * DTYPES[table.dtype].itemsize
            count = max(2, min(ID_SETS, KEPT_BYTES // rows))
        drawn = id_sets(cell.ids, MODELS[table.model].V, cell.N, sets=count, text=self.options.text)
        return [ids.to(self.options.device) for ids in drawn]

    def _run_cell(
        self,
        table: Table,
        cell: Cell,
        problems: list[Problem],
        lookups: dict[str, list[Lookup]],
        sets: list[Tensor],
    ) -> None:
        device = self.options.device
        check = Check(problems[0], sets[0], cell.mode)

        def prepare(name: str) -> Prepared | None:
            built = lookups[name]
            if cell.mode not in PROVIDERS[name].modes or not (cell.mode == FORWARD or built[0].leaves):
                return None
            error = check(built[0], PROVIDERS[name].allowed_factor)
            turns = itertools.cycle(built)
            calls = [mode_call(cell.mode, next(turns), ids, check.upstream) for ids in sets]
            sample, timer = sampler(device, calls)
            measures_peak = cell.mode == FORWARD and check.output_bytes >= MIN_PEAK_OUTPUT
            return Prepared(sample, {"error": error, "timer": timer}, calls[0] if measures_peak else None)

        with torch.set_grad_enabled(cell.mode != FORWARD):
            measured = self.measure(f"{table}, {cell}", lookups, prepare)
        distinct = statistics.mean(len(ids.unique()) for ids in sets)
        for name in measured.times:
            figures, peak = measured.figures(name), measured.peaks.get(name)
            least_bytes, least_flops = self._least(table, cell, name, lookups[name][0].nbytes, distinct)
            bound = max(least_bytes / self.bandwidth, least_flops / self.gemm[table.dtype]) / 1e3
            self.rows.append(
                {
                    "op": "gather_project",
                    "provider": name,
                    **asdict(table),
                    **asdict(cell),
                    "V": MODELS[table.model].V,
                    "H": MODELS[table.model].H,
                    "distinct": round(distinct, 1),
                    "device": device,
                    **figures,
                    "gbps": round(least_bytes / figures["p50"] / 1e3, 3),
                    "gflops": round(least_flops / figures["p50"] / 1e3, 3),
                    "share": round(bound / figures["p50"], 4),
                    **speedups(measured.times, name, PROVIDERS[name].baselines),
                    "table_bytes": lookups[name][0].nbytes,
                    "peak_bytes": peak,
                    "peak_over_output": None if peak is None else round(peak / check.output_bytes, 3),
                }
            )
        if measured.times:
            print(measured.line(f"{cell.mode:9}{cell.ids:8} N={cell.N}", lookups), flush=True)

    def _least(
        self, table: Table, cell: Cell, name: str, nbytes: int, distinct: float
    ) -> tuple[float, float]:
        """Return bytes and flops by the module's formulas; ``nbytes`` is the size of the provider's table."""
        model, size, N, U, r = MODELS[table.model], DTYPES[table.dtype].itemsize, cell.N, distinct, table.r
        V, H = model.V, model.H
        if PROVIDERS[name].dense:
            forward, backward = U * nbytes / (V * size) + N * H, float(N * H + V * H)
            flops_forward = flops_backward = 0.0
        else:
            forward = U * r + r * H + H + N * H
            backward = N * H + U * r + r * H + (U if PROVIDERS[name].sparse else V) * r + r * H + H
            flops_forward, flops_backward = 2 * U * r * H, 4 * U * r * H
        parts = {FORWARD: (1, 0), BACKWARD: (0, 1)}.get(cell.mode, (1, 1))
        elements = parts[0] * forward + parts[1] * backward
        return 8 * N * sum(parts) + elements * size, parts[0] * flops_forward + parts[1] * flops_backward


def print_speedups(rows: list[dict[str, Any]]) -> None:
    """Print how many times as fast embkern is as the faster of two-step eager and compiled, by N."""
    ours = [row for row in rows if row["provider"] == "embkern" and row["speedup"] is not None]
    counts = sorted({row["N"] for row in ours})
    if not ours:
        return
    print("\nembkern against the faster of two-step eager and compiled (above 1 is faster)")
    print(
        f"{'model':12}{'r':>4} {'dtype':6}{'mode':9}{'ids':8}"
        + "".join(f"{f'N={count}':>9}" for count in counts)
    )
    lines: dict[tuple, dict[int, str]] = {}
    for row in ours:
        key = (row["model"], row["r"], row["dtype"], row["mode"], row["ids"])
        lines.setdefault(key, {})[row["N"]] = f"{row['speedup']:.2f}"
    for (model, rank, dtype, mode, ids), line in lines.items():
        cells = "".join(f"{line.get(count, '-'):>9}" for count in counts)
        print(f"{model:12}{rank:>4} {dtype:6}{mode:9}{ids:8}{cells}")

"""gather_project beside what a user could run instead: latency, share of the machine's bound, peak memory.

No time is taken of a wrong result: every provider first has to be no further from float64 than twice the
error of two steps in plain torch (a dense or quantised table: right for its own rows). Providers are timed in
turn, round after round, and every round uses other ids. A speed-up is the median over rounds of the ratio
within a round.

What the figures are relative to, with U distinct ids among N (the least that any method has to do):

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
import contextlib
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import common
from .common import (
    DTYPES,
    Report,
    copy_bandwidth,
    cpu_sampler,
    cuda_sampler,
    gemm_peak,
    paired_rounds,
    peak_bytes,
    quantiles,
    relative_error,
    side_stream,
    table_line,
)
from .peers import BACKWARD, FORWARD, MODES, PROVIDERS, Lookup, Problem
from .shapes import COUNTS, MODELS, SENTENCES, STREAMS, UnavailableError, id_sets

CHECKED_ROWS = 512
# Values of the smallest result that a check compares at least, over several batches where one has fewer. Two
# kernels as good as each other differ by their draw of rounding errors: the ratio of the root mean squares of
# n errors each has a standard deviation of about n^-1/2. One row of 24 values fails a factor of 2 in one run
# of a hundred; at 256 values the factor is seven standard deviations away, even for errors a third larger.
CHECKED_VALUES = 256
ID_SETS = 8
KEPT_BYTES = 2**28  # of outputs that the backward mode may keep alive per provider
MIN_PEAK_OUTPUT = 2**20  # a smaller output drowns in the granularity of the resident set

# What runs when nothing is selected: the paper's table in full, the large vocabularies at three sizes.
Selection = dict[str, list[Any]]
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
    """What the providers are built for, once."""

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
    if options.threads:
        torch.set_num_threads(options.threads)
    bench = Bench(options, " ".join(["python -m benchmarks gather_project", *arguments]))
    with side_stream(options.device):
        bench.run(plan(options))
    print_speedups(bench.rows)
    bench.finish()


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gather_project",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, help="what is not given keeps its default selection")
    add("--ranks", nargs="+", type=int)
    add("--counts", nargs="+", type=int, help="N, the numbers of ids")
    add("--ids", nargs="+", choices=STREAMS)
    add("--text", type=Path, default=SENTENCES, help="text file of the ids `text`, tokenised for bert-base")
    add("--dtypes", nargs="+", choices=DTYPES)
    add("--modes", nargs="+", choices=MODES)
    common.add_options(parser, PROVIDERS)
    return common.parse(parser, arguments, {"cpu": (2.0, 0.5), "cuda": (0.5, 0.2)})


def plan(options: argparse.Namespace) -> list[tuple[Table, list[Cell]]]:
    """Return the cells by table: the default selections, with what the options give in place of theirs."""
    tables: dict[Table, dict[Cell, None]] = {}
    for selection in (QUICK if options.quick else DEFAULT)[options.device]:
        given = {key: getattr(options, key) for key in selection if getattr(options, key)}
        chosen = selection | given
        for name, dtype in itertools.product(chosen["models"], chosen["dtypes"]):
            known = MODELS[name].ranks
            # Ranks that were asked for are taken; those of a selection only where the model has them.
            ranks = given.get("ranks") or [r for r in chosen["ranks"] if r in known] or known
            for rank in ranks:
                cells = tables.setdefault(Table(name, rank, dtype), {})
                for mode, ids, count in itertools.product(chosen["modes"], chosen["ids"], chosen["counts"]):
                    cells.setdefault(Cell(mode, ids, count))
    return [(table, list(cells)) for table, cells in tables.items()]


class Bench(Report):
    """Runs cells and keeps their rows."""

    def __init__(self, options: argparse.Namespace, command: str) -> None:
        super().__init__("gather_project", command, options)
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
        for position, (table, cells) in enumerate(tables):
            if self.late():
                left = sum(len(cells) for _, cells in tables[position:])
                print(f"--limit-seconds: {left} cells of {len(tables) - position} tables were not measured")
                return
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
        for name in self.names:
            if not any(cell.mode in PROVIDERS[name].modes for cell in cells):
                continue
            if reason := PROVIDERS[name].reason(self.options.device, DTYPES[table.dtype]):
                self.missing(f"{name} {table.dtype}", reason)
                continue
            with self.recorded(name, f"{table}, build"):
                lookups[name] = [PROVIDERS[name].build(problem) for problem in problems]
        title = f"{table.model} r={table.r} {table.dtype}"
        print(f"\nmedian us\n{table_line(title, {name: name for name in lookups}, lookups)}")
        for cell in cells:
            if self.late():
                return
            try:
                sets = self._id_sets(table, cell)
            except UnavailableError as error:
                self.missing(f"{cell.ids} ids, {table.model}", str(error))
                continue
            self._run_cell(table, cell, problems, lookups, sets)

    def _problems(self, table: Table) -> list[Problem]:
        """Several copies of a table that the GPU's L2 cache would hold, so that codes come from memory."""
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
        sampler = cuda_sampler if device == "cuda" else cpu_sampler
        check = Check(problems[0], sets[0], cell.mode)
        samples, timers, peaks, errors = {}, {}, {}, {}
        with torch.no_grad() if cell.mode == FORWARD else contextlib.nullcontext():
            for name, built in lookups.items():
                if cell.mode not in PROVIDERS[name].modes or not (cell.mode == FORWARD or built[0].leaves):
                    continue
                with self.recorded(name, f"{table}, {cell}"):
                    errors[name] = check(built[0], PROVIDERS[name].allowed_factor)
                    turns = itertools.cycle(built)
                    calls = [mode_call(cell.mode, next(turns), ids, check.upstream) for ids in sets]
                    samples[name], timers[name] = sampler(calls)
                    if cell.mode == FORWARD and check.output_bytes >= MIN_PEAK_OUTPUT:
                        peaks[name] = peak_bytes(calls[0], device)
            if not samples:
                return
            times = paired_rounds(
                samples, seconds=self.options.cell_seconds, repeats=(5, max(5, self.options.repeats))
            )
        distinct = statistics.mean(len(ids.unique()) for ids in sets)
        rows = []
        for name, measured in times.items():
            figures = quantiles(measured)
            least_bytes, least_flops = self._least(table, cell, name, lookups[name][0].nbytes, distinct)
            bound = max(least_bytes / self.bandwidth, least_flops / self.gemm[table.dtype]) / 1e3
            peak = peaks.get(name)
            rows.append(
                {
                    "op": "gather_project",
                    "provider": name,
                    **asdict(table),
                    **asdict(cell),
                    "V": MODELS[table.model].V,
                    "H": MODELS[table.model].H,
                    "distinct": round(distinct, 1),
                    "device": device,
                    "error": errors[name],
                    "timer": timers[name],
                    "rounds": len(measured),
                    "p50": figures["median"],
                    "p20": figures["p20"],
                    "p80": figures["p80"],
                    "gbps": round(least_bytes / figures["median"] / 1e3, 3),
                    "gflops": round(least_flops / figures["median"] / 1e3, 3),
                    "share": round(bound / figures["median"], 4),
                    **speedups(times, name),
                    "table_bytes": lookups[name][0].nbytes,
                    "peak_bytes": peak,
                    "peak_over_output": None if peak is None else round(peak / check.output_bytes, 3),
                }
            )
        self.rows += rows
        medians = {row["provider"]: f"{row['p50']:.1f}" for row in rows}
        print(table_line(f"{cell.mode:9}{cell.ids:8} N={cell.N}", medians, lookups), flush=True)

    def _least(
        self, table: Table, cell: Cell, name: str, nbytes: int, distinct: float
    ) -> tuple[float, float]:
        """Bytes and flops of the module's table of formulas; ``nbytes`` of the provider's table."""
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


def mode_call(mode: str, lookup: Lookup, ids: Tensor, upstream: Tensor | None) -> Callable[[], Any]:
    """Return the call that is timed: rows, their gradients from a kept graph, or both."""
    if mode == FORWARD:
        return lambda: lookup.call(ids)
    if mode == BACKWARD:
        rows = lookup.call(ids)
        return lambda: torch.autograd.grad(rows, lookup.leaves, upstream, retain_graph=True)
    return lambda: torch.autograd.grad(lookup.call(ids), lookup.leaves, upstream)


class Check:
    """Whether a provider is right, against float64: for a batch of ids, or several if they are small."""

    def __init__(self, problem: Problem, ids: Tensor, mode: str) -> None:
        self.problem, self.mode = problem, mode
        values = len(ids) * problem.model.H
        if mode != FORWARD:  # of the gradient of the codes, or of the offset
            values = min(len(ids.unique()) * problem.codes.shape[1], problem.model.H)
        batches = -(-CHECKED_VALUES // values)
        shape = (len(ids), problem.model.H)
        self.output_bytes = shape[0] * shape[1] * problem.dtype.itemsize
        self.upstream = None
        upstreams: list[Tensor | None] = [None] * batches
        if mode != FORWARD:
            generator = torch.Generator(problem.device).manual_seed(1)
            upstream = torch.randn(shape, generator=generator, device=problem.device)
            self.upstream = upstream.to(problem.dtype)
            upstreams = [self.upstream.roll(k, 1) for k in range(batches)]
        self.batches = [((ids + k) % problem.model.V, each) for k, each in enumerate(upstreams)]
        picked = torch.linspace(0, len(ids) - 1, min(len(ids), CHECKED_ROWS), dtype=torch.float64)
        self.picked = picked.round().long().to(ids.device)
        self.plain: list[float] | None = None

    def __call__(self, lookup: Lookup, allowed_factor: float = 2.0) -> float:
        """Return the largest relative error; AssertionError where it is larger than it may be."""
        errors = self._errors(lookup)
        if lookup.own_rows is not None and self.mode == FORWARD:
            allowed = [lookup.tolerance]
        else:
            allowed = [allowed_factor * error + 1e-7 for error in self._plain_errors(lookup)]
        for error, limit in zip(errors, allowed, strict=True):
            assert error <= limit, f"relative error {error:.2e}, at most {limit:.2e} is allowed"
        return max(errors)

    def _plain_errors(self, lookup: Lookup) -> list[float]:
        """The errors of plain torch in the same dtype: two steps, or ``F.embedding`` of a dense table."""
        if lookup.own_rows is not None:
            return self._errors(PROVIDERS["dense"].build(self.problem))
        if self.plain is None:
            self.plain = self._errors(PROVIDERS["two-step"].build(self.problem))
        return self.plain

    def _errors(self, lookup: Lookup) -> list[float]:
        """The relative error of each result, of all batches together."""
        of_batches = [self._results(lookup, ids, upstream) for ids, upstream in self.batches]
        return [
            relative_error(torch.cat([got for got, _ in each]), torch.cat([exact for _, exact in each]))
            for each in zip(*of_batches, strict=True)
        ]

    def _results(self, lookup: Lookup, ids: Tensor, upstream: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """What a provider makes of a batch, each beside the exact result."""
        if self.mode == FORWARD:
            rows = lookup.call(ids)
            assert rows.shape == (len(ids), self.problem.model.H), f"shape {tuple(rows.shape)}"
            picked = ids[self.picked]
            exact = lookup.own_rows(picked) if lookup.own_rows else self._exact_rows(picked)
            return [(rows[self.picked], exact)]
        assert upstream is not None
        grads = mode_call(self.mode, lookup, ids, upstream)()
        return list(self._pairs(grads, ids, upstream.double(), dense=lookup.own_rows is not None))

    def _exact_rows(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            codes, basis, offset = (factor.double() for factor in self._gathered(ids))
            return codes @ basis + offset

    def _gathered(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, basis, offset = self.problem.factors
        return codes.detach()[ids], basis.detach(), offset.detach()

    def _pairs(
        self, grads: tuple[Tensor, ...], ids: Tensor, upstream: Tensor, dense: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Each gradient beside the exact one; of a table only the rows that occur, the rest is zero."""
        distinct, position = ids.unique(return_inverse=True)
        codes, basis, _ = (factor.double() for factor in self._gathered(ids))
        per_position = upstream if dense else upstream @ basis.t()
        exact = per_position.new_zeros(len(distinct), per_position.shape[1]).index_add_(
            0, position, per_position
        )
        yield _rows_of(grads[0], distinct), exact
        if not dense:
            yield grads[1], codes.t() @ upstream
            yield grads[2], upstream.sum(0)


def _rows_of(grad: Tensor, distinct: Tensor) -> Tensor:
    """Rows of a table's gradient in float64, dense or sparse, after checking that all others are zero."""
    if grad.is_sparse:
        ids, values = grad._indices()[0], grad._values()
        position = torch.searchsorted(distinct, ids).clamp_(max=len(distinct) - 1)
        known = distinct[position] == ids
        assert not values[~known].any(), "a gradient of a row that no id names"
        rows = values.new_zeros(len(distinct), values.shape[1], dtype=torch.float64)
        return rows.index_add_(0, position[known], values[known].double())
    occurs = (grad != 0).any(1)
    occurs[distinct] = False
    assert not occurs.any(), "a gradient of a row that no id names"
    return grad[distinct].double()


def speedups(times: dict[str, list[float]], name: str) -> dict[str, Any]:
    """How many times as fast a provider is as the faster of its baselines."""
    return common.speedups(times, name, PROVIDERS[name].baselines)


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

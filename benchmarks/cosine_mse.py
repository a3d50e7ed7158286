"""cosine_mse_loss beside plain torch: latency, share of the machine's bound, peak memory.

The rivals: the formula as one writes it (F.cosine_similarity and F.mse_loss), and with three dot products per
row (y.x, y.y, x.x), which gives a compiler the least to do; both eager and compiled, the latter also with
the targets' squared norms computed beforehand (``-norm``), as a trainer on a constant table would have them.

No time is taken of a wrong result: loss and gradient first have to be no further from float64 than twice the
error of the eager three-dot form, which sums 16-bit rows in fp32; rivals may be less exact. Providers are
timed in turn, round after round, on several batches in turn that together do not fit a cache. A speed-up is
the median over rounds of the ratio within a round.

gbps is the least traffic over the median time: output and target are read, and with the gradient (``both``)
that is written: 2 or 3 times N H elements. share is the time of that traffic at the measured copy bandwidth
over the median; small cases sit in cache and can pass 1. Every provider allocates its gradient at each call.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from embkern.ops import cosine_mse_loss
from embkern.ops.backends import Backend, unavailable

from . import common
from .common import (
    DTYPES,
    Report,
    copy_bandwidth,
    cpu_sampler,
    cuda_sampler,
    paired_ratio,
    paired_rounds,
    peak_bytes,
    quantiles,
    relative_error,
    side_stream,
    table_line,
)
from .peers import BOTH, FORWARD, no_compiler

MODES = (FORWARD, BOTH)
BATCHES = 8
KEPT_BYTES = 2**28  # of outputs and targets, unless two batches need more
MIN_PEAK_GRADIENT = 2**20  # a smaller one drowns in the granularity of the resident set
# In fp16 the gradient of a mean vanishes without the loss scale that every trainer uses there.
LOSS_SCALE = {torch.float16: 2.0**15}


@dataclass(frozen=True)
class Terms:
    """Weights of the loss: those that cosine_mse_loss calls by these names."""

    cosine_weight: float
    mse_weight: float = 0.0
    power_weight: float = 0.0
    alpha: float = 1.0
    eps: float = 1e-8


TERMS = {
    "cosine+mse": Terms(1.0, mse_weight=1.0),
    # The authors' recipe halfway through the fall of alpha from 1 to 0.1.
    "cosine+power": Terms(0.9975 / 5, power_weight=0.0025, alpha=0.55, eps=1e-6),
}


@dataclass
class Batch:
    """output (N, H), a leaf, and target (N, H), with what is known of the target beforehand."""

    output: Tensor
    target: Tensor
    norm: Tensor
    squared_norm: Tensor

    @classmethod
    def random(cls, N: int, H: int, dtype: torch.dtype, device: str, seed: int = 0) -> Batch:
        """Rows that point in about the same direction, as those of a fit do."""
        generator = torch.Generator(device).manual_seed(seed)
        target, noise = (torch.randn(N, H, generator=generator, device=device) for _ in range(2))
        output = target + 0.5 * noise
        rounded = target.to(dtype)
        norm = torch.linalg.vector_norm(rounded, dim=1, dtype=torch.float32)
        return cls(output.to(dtype).requires_grad_(), rounded, norm, norm.square())


Loss = Callable[[Batch], Tensor]


def plain(output: Tensor, target: Tensor, terms: Terms, alpha: float | Tensor | None = None) -> Tensor:
    """The formula as one writes it; ``alpha`` in place of that in ``terms``."""
    loss = terms.cosine_weight * (1 - F.cosine_similarity(output, target, dim=-1, eps=terms.eps)).mean()
    if terms.mse_weight:
        loss = loss + terms.mse_weight * F.mse_loss(output, target)
    return loss + _power(output - target, terms, alpha) if terms.power_weight else loss


def three_dot(
    output: Tensor,
    target: Tensor,
    squared_norm: Tensor | None,
    terms: Terms,
    alpha: float | Tensor | None = None,
) -> Tensor:
    """Three sums of products per row, in fp32; the squared error follows from them.

    Compiled, the form of plain torch that was fastest: ``(y - x)`` squared instead takes about 1.2 times as
    long, and a mean of each term by itself is no faster.
    """
    y, x = output.float(), target.float()
    dot, of_y = (y * x).sum(1), (y * y).sum(1)
    of_x = (x * x).sum(1) if squared_norm is None else squared_norm
    cosine = dot * torch.rsqrt((of_y * of_x).clamp_min(terms.eps**2))
    rows = terms.cosine_weight * (1 - cosine)
    if terms.mse_weight:
        rows = rows + (terms.mse_weight / y.shape[1]) * (of_y - 2 * dot + of_x)
    return rows.mean() + _power(y - x, terms, alpha) if terms.power_weight else rows.mean()


def _power(difference: Tensor, terms: Terms, alpha: float | Tensor | None) -> Tensor:
    exponent = terms.alpha if alpha is None else alpha
    return terms.power_weight * (difference.abs() + 1e-10).pow(exponent).mean()


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Any:
    # One graph per shape, as a trainer with a fixed batch has it.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=False, fullgraph=True)


def _plain(terms: Terms, wrap: Callable = lambda function: function) -> Loss:
    return lambda batch: wrap(plain)(batch.output, batch.target, terms)


def _three_dot(terms: Terms, wrap: Callable = lambda function: function, known: bool = False) -> Loss:
    return lambda batch: wrap(three_dot)(
        batch.output, batch.target, batch.squared_norm if known else None, terms
    )


def _embkern(terms: Terms, backend: Backend | None = None, known: bool = False) -> Loss:
    weights = vars(terms)
    return lambda batch: cosine_mse_loss(
        batch.output, batch.target, target_norm=batch.norm if known else None, backend=backend, **weights
    )


def _always(device: str, dtype: torch.dtype) -> None:
    return None


def _backend_reason(backend: str, device: str, dtype: torch.dtype) -> str | None:
    return unavailable(backend, "cosine_mse", device, dtype)


def _liger(device: str, dtype: torch.dtype) -> str:
    return (
        "LigerFusedLinearCosineSimilarityLoss is another loss: of the logits of two linear heads, summed and "
        "added to a cross-entropy; its cosine is plain torch under torch.compile, as in `compiled`"
    )


@dataclass(frozen=True)
class Provider:
    """How to build one competitor, when it can run, what it is compared with.

    ``rival``: it is not left out for an inexact sum.
    """

    build: Callable[[Terms], Loss]
    reason: Callable[[str, torch.dtype], str | None] = _always
    baselines: tuple[str, ...] = ("three-dot", "three-dot-compiled")
    rival: bool = True


KNOWN = ("three-dot-norm-compiled",)
PROVIDERS: dict[str, Provider] = {
    "eager": Provider(_plain),
    "compiled": Provider(lambda terms: _plain(terms, _compiled), no_compiler),
    "three-dot": Provider(_three_dot),
    "three-dot-compiled": Provider(lambda terms: _three_dot(terms, _compiled), no_compiler),
    "three-dot-norm-compiled": Provider(
        lambda terms: _three_dot(terms, _compiled, known=True), no_compiler, KNOWN
    ),
    "liger": Provider(_plain, _liger),
    "embkern": Provider(_embkern, rival=False),
    **{
        f"embkern-{backend}": Provider(
            functools.partial(_embkern, backend=backend),
            functools.partial(_backend_reason, backend),
            rival=False,
        )
        for backend in get_args(Backend)
    },
    "embkern-norm": Provider(functools.partial(_embkern, known=True), baselines=KNOWN, rival=False),
}
COMPILED = tuple(name for name in PROVIDERS if name.endswith("compiled"))


@dataclass(frozen=True)
class Cell:
    """What is measured: one loss on rows of one shape and dtype, without or with its gradient."""

    terms: str
    N: int
    H: int
    dtype: str
    mode: str


Selection = dict[str, list[Any]]
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
    if options.threads:
        torch.set_num_threads(options.threads)
    bench = Bench(options, " ".join(["python -m benchmarks cosine_mse", *arguments]))
    with side_stream(options.device):
        bench.run(plan(options))
    print_speedups(bench.rows)
    bench.finish()


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks cosine_mse",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shapes", nargs="+", help="NxH; what is not given keeps its default selection")
    add("--terms", nargs="+", choices=TERMS)
    add("--dtypes", nargs="+", choices=DTYPES)
    add("--modes", nargs="+", choices=MODES)
    common.add_options(parser, PROVIDERS)
    return common.parse(parser, arguments, {"cpu": (2.0, 0.5), "cuda": (0.5, 0.2)})


def plan(options: argparse.Namespace) -> list[Cell]:
    """Return the cells: the default selections, with what the options give in place of theirs."""
    cells: dict[Cell, None] = {}
    for selection in (QUICK if options.quick else DEFAULT)[options.device]:
        given = {key: getattr(options, key) for key in selection if getattr(options, key)}
        chosen = selection | given
        for parts in itertools.product(*(chosen[key] for key in ("terms", "dtypes", "shapes", "modes"))):
            terms, dtype, shape, mode = parts
            N, H = map(int, shape.split("x"))
            cells.setdefault(Cell(terms, N, H, dtype, mode))
    return list(cells)


class Bench(Report):
    """Runs cells and keeps their rows."""

    def __init__(self, options: argparse.Namespace, command: str) -> None:
        super().__init__("cosine_mse", command, options)
        self.names = [
            name for name in options.providers or PROVIDERS if not (options.no_compile and name in COMPILED)
        ]
        self.bandwidth = copy_bandwidth(options.device)
        self.facts = {"copy_gbps": round(self.bandwidth, 2)}
        print(f"copy bandwidth {self.bandwidth:.1f} GB/s (reads plus writes)")

    def run(self, cells: list[Cell]) -> None:
        """Measure every cell; the results file is written after each."""
        heading: tuple[str, str] | None = None
        for position, cell in enumerate(cells):
            if self.late():
                print(f"--limit-seconds: {len(cells) - position} cells were not measured")
                return
            names = self._available(DTYPES[cell.dtype])
            if heading != (cell.terms, cell.dtype):
                heading = (cell.terms, cell.dtype)
                print(f"\nmedian us\n{table_line(' '.join(heading), {n: n for n in names}, names)}")
            self._run_cell(cell, names)
            self.write()

    def _available(self, dtype: torch.dtype) -> list[str]:
        names = []
        for name in self.names:
            if reason := PROVIDERS[name].reason(self.options.device, dtype):
                self.missing(f"{name} {dtype}" if name != "liger" else name, reason)
            else:
                names.append(name)
        return names

    def _run_cell(self, cell: Cell, names: list[str]) -> None:
        device, dtype, terms = self.options.device, DTYPES[cell.dtype], TERMS[cell.terms]
        torch._dynamo.reset()
        elements = cell.N * cell.H
        gradient_bytes = elements * dtype.itemsize
        count = max(2, min(BATCHES, KEPT_BYTES // (2 * gradient_bytes)))
        batches = [Batch.random(cell.N, cell.H, dtype, device, seed) for seed in range(count)]
        sampler = cuda_sampler if device == "cuda" else cpu_sampler
        samples, timers, peaks, errors = {}, {}, {}, {}
        with torch.set_grad_enabled(cell.mode != FORWARD):
            check = Check(batches[0], cell.mode, terms)
            for name in names:
                with self.recorded(name, str(cell)):
                    loss = PROVIDERS[name].build(terms)
                    errors[name] = check(loss, PROVIDERS[name].rival)
                    calls = [mode_call(cell.mode, loss, batch) for batch in batches]
                    samples[name], timers[name] = sampler(calls)
                    if gradient_bytes >= MIN_PEAK_GRADIENT:
                        peaks[name] = peak_bytes(calls[0], device)
            if not samples:
                return
            times = paired_rounds(
                samples, seconds=self.options.cell_seconds, repeats=(5, max(5, self.options.repeats))
            )
        passes = 2 if cell.mode == FORWARD else 3
        for name, measured in times.items():
            figures, peak = quantiles(measured), peaks.get(name)
            gbps = passes * gradient_bytes / figures["median"] / 1e3
            rivals = [each for each in times if not each.startswith("embkern")]
            self.rows.append(
                {
                    "op": "cosine_mse",
                    "provider": name,
                    **vars(cell),
                    "device": device,
                    "error": errors[name],
                    "timer": timers[name],
                    "rounds": len(measured),
                    "p50": figures["median"],
                    "p20": figures["p20"],
                    "p80": figures["p80"],
                    "gbps": round(gbps, 3),
                    "share": round(gbps / self.bandwidth, 4),
                    **common.speedups(times, name, PROVIDERS[name].baselines),
                    "times_as_fast_as": {each: paired_ratio(times, each, name) for each in rivals},
                    "peak_bytes": peak,
                    "peak_over_gradient": None if peak is None else round(peak / gradient_bytes, 3),
                }
            )
        medians = {name: f"{quantiles(each)['median']:.1f}" for name, each in times.items()}
        print(table_line(f"{cell.mode:9}{cell.N} x {cell.H}", medians, names), flush=True)


def mode_call(mode: str, loss: Loss, batch: Batch) -> Callable[[], Any]:
    """Return the call that is timed: the loss, or the loss and its gradient of output."""
    if mode == FORWARD:
        return lambda: loss(batch)
    scale = LOSS_SCALE.get(batch.output.dtype)
    if scale is None:
        return lambda: torch.autograd.grad(loss(batch), batch.output)
    upstream = torch.full_like(loss(batch).detach(), scale)
    return lambda: torch.autograd.grad(loss(batch), batch.output, upstream)


class Check:
    """Whether a provider is right for one batch, against float64."""

    def __init__(self, batch: Batch, mode: str, terms: Terms) -> None:
        self.batch, self.mode = batch, mode
        exact = Batch(
            batch.output.detach().double().requires_grad_(), batch.target.double(), batch.norm, batch.norm
        )
        self.exact = self._results(_plain(terms), exact, LOSS_SCALE.get(batch.output.dtype, 1.0))
        self.plain = self._errors(_three_dot(terms))

    def __call__(self, loss: Loss, rival: bool = False) -> float:
        """Return the largest relative error; AssertionError where it is larger than it may be."""
        errors = self._errors(loss)
        factor, slack = 20.0 if rival else 2.0, 1e-6  # a sum may be exact by chance
        if rival and self.batch.output.element_size() == 2:
            slack = 0.02  # sums in 16 bits
        for error, plain_error in zip(errors, self.plain, strict=True):
            limit = factor * plain_error + slack
            assert error <= limit, f"relative error {error:.2e}, at most {limit:.2e} is allowed"
        return max(errors)

    def _errors(self, loss: Loss) -> list[float]:
        scale = LOSS_SCALE.get(self.batch.output.dtype, 1.0)
        results = self._results(loss, self.batch, scale)
        return [relative_error(got, exact) for got, exact in zip(results, self.exact, strict=True)]

    def _results(self, loss: Loss, batch: Batch, scale: float) -> list[Tensor]:
        value = loss(batch)
        if self.mode == FORWARD:
            return [value.detach()]
        return [value.detach(), *torch.autograd.grad(value, batch.output, torch.full_like(value, scale))]


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

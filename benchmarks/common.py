"""What every benchmark shares: interleaved timing, peak memory, the machine it ran on, the results file."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embkern.io.atomic import replacing

from .machine import environment, first_line, lost_context

ROOT = Path(__file__).parents[1]
RESULTS = Path(os.environ.get("EMBKERN_RESULTS") or Path(__file__).parent / "results")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# A sample shorter than this is mostly the clock's own noise, so several calls go into one.
MIN_SAMPLE_US = 200.0
MAX_CALLS_PER_SAMPLE = 64
MAX_WARMUP_SECONDS = 0.1
# Below about 100 us of device time a CUDA call is bound by its launch; eager time is up to ten times that.
GRAPH_BELOW_US = 1000.0


def interleaved(
    providers: dict[str, Callable[[], Any]], *, repeats: int = 20, warmup: int = 3, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Time every provider in turn, round after round, so that noise falls on all of them alike.

    Returns microseconds per provider: median, p20 and p80.
    """
    times: dict[str, list[float]] = {name: [] for name in providers}
    for round_ in range(warmup + repeats):
        for name, call in providers.items():
            _synchronize(device)
            start = time.perf_counter()
            call()
            _synchronize(device)
            if round_ >= warmup:
                times[name].append((time.perf_counter() - start) * 1e6)
    return {name: quantiles(each) for name, each in times.items()}


Sample = Callable[[], float]


def cpu_sampler(calls: list[Callable[[], Any]]) -> tuple[Sample, str]:
    """Return a function that times the next calls, in microseconds per call, and the timer's name.

    ``calls`` are one provider's, one per batch of ids; samples go through them in turn, so that no timing is
    of one batch that stays in cache.
    """
    turns = itertools.cycle(calls)

    def sample(count: int) -> float:
        batch = list(itertools.islice(turns, count))
        start = time.perf_counter()
        for call in batch:
            call()
        return (time.perf_counter() - start) * 1e6 / count

    start = time.perf_counter()
    for _ in calls:  # one pass over the batches to warm up, or a part of it where the calls are slow
        once = sample(1)
        if time.perf_counter() - start > MAX_WARMUP_SECONDS:
            break
    count = _per_sample(once)
    return lambda: sample(count), "perf_counter"


def side_stream(device: str) -> contextlib.AbstractContextManager:
    """On CUDA, a stream that is not the default one, on which no CUDA graph can be captured."""
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()


def cuda_sampler(calls: list[Callable[[], Any]]) -> tuple[Sample, str]:
    """Like `cpu_sampler`, by CUDA events; short calls are captured in a CUDA graph, all batches in one.

    Must run in ``side_stream``, or nothing can be captured.
    """

    def every() -> None:
        for call in calls:
            call()

    def timed(run: Callable[[], Any], count: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / (count * len(calls))

    for _ in range(3):
        every()
    estimate, run, timer = timed(every, 1), every, "cuda events"
    if estimate < GRAPH_BELOW_US:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                every()
            run, timer = graph.replay, "cuda graph"
            run()
        except RuntimeError as error:
            torch.cuda.synchronize()
            timer += f" (no graph: {str(error).splitlines()[0]})"
    count = _per_sample(timed(run, 1) * len(calls))
    return lambda: timed(run, count), timer


def _per_sample(microseconds: float) -> int:
    return max(1, min(MAX_CALLS_PER_SAMPLE, round(MIN_SAMPLE_US / max(microseconds, 1e-3))))


def paired_rounds(
    samples: dict[str, Sample], *, seconds: float, repeats: tuple[int, int]
) -> dict[str, list[float]]:
    """Take one sample of every provider per round, in a new order each time.

    The k-th entries of two lists are of one round: noise that lasts longer than a round cancels in their
    ratio. The number of rounds fills ``seconds``, within the two bounds in ``repeats``.
    """
    times: dict[str, list[float]] = {name: [] for name in samples}
    order, shuffle = list(samples), random.Random(0).shuffle
    fewest, most = repeats
    start = time.perf_counter()
    for done in range(most):
        if done >= fewest and time.perf_counter() - start > seconds:
            break
        shuffle(order)
        for name in order:
            times[name].append(samples[name]())
    return times


def quantiles(times: list[float]) -> dict[str, float]:
    """Return the median, p20 and p80 of at least two times."""
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return {
        "median": round(statistics.median(times), 2),
        "p20": round(cuts[1], 2),
        "p80": round(cuts[7], 2),
    }


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def paired_ratio(times: dict[str, list[float]], baseline: str, name: str) -> float:
    """Return how many times as fast ``name`` is as ``baseline``: the median of the ratios within a round."""
    ratios = (theirs / ours for theirs, ours in zip(times[baseline], times[name], strict=True))
    return round(statistics.median(ratios), 3)


def speedups(times: dict[str, list[float]], name: str, baselines: Iterable[str]) -> dict[str, Any]:
    """How many times as fast a provider is as the faster of its baselines: paired rounds, and medians."""
    measured = [each for each in baselines if each in times]
    if not measured:
        return {"baseline": None, "speedup": None, "speedup_of_medians": None}
    baseline = min(measured, key=lambda each: statistics.median(times[each]))
    of_medians = statistics.median(times[baseline]) / statistics.median(times[name])
    return {
        "baseline": baseline,
        "speedup": paired_ratio(times, baseline, name),
        "speedup_of_medians": round(of_medians, 3),
    }


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of ``exact``; infinite where it is NaN."""
    error = float((got.detach().double() - exact).norm() / exact.norm().clamp_min(1e-300))
    return error if error == error else float("inf")


def peak_bytes(call: Callable[[], Any], device: str) -> int | None:
    """Return how far memory rises during one call, its result included; None where that cannot be measured.

    CUDA: torch's allocator. CPU: the resident set (Linux), freed heap handed back first. A page counts when
    it is first written; scratch that a library allocated once and keeps does not.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is None:
        return None
    trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
        before = _resident()["VmRSS"]
        call()
        return max(0, _resident()["VmHWM"] - before)
    except OSError:
        return None


def _resident() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        line.split(":")[0]: int(line.split()[1]) * 1024
        for line in lines
        if line.startswith(("VmRSS", "VmHWM"))
    }


def copy_bandwidth(device: str) -> float:
    """Return the bandwidth of a large copy in GB/s, reads plus writes, the best of several."""
    source = torch.ones((2**30 if device == "cuda" else 2**28) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device) / 1e9


def gemm_peak(dtype: torch.dtype, device: str) -> float:
    """Return the rate of a large square product in GFLOP/s, the best of several."""
    size = 8192 if device == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / _best_seconds(lambda: torch.mm(left, right, out=out), device) / 1e9


def _best_seconds(call: Callable[[], Any], device: str) -> float:
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 1 and len(times) < 10):
        _synchronize(device)
        start = time.perf_counter()
        call()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def write_results(
    name: str,
    command: str,
    rows: list[dict[str, Any]],
    *,
    directory: Path = RESULTS,
    machine: dict[str, Any] | None = None,
    **more: Any,
) -> Path:
    """Write rows with the command and the environment, and what else is given, to ``directory/NAME.json``.

    ``machine`` is an environment that was read earlier, or in another process.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    head = json.dumps({"command": command, "environment": machine or environment(), **more}, indent=1)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)  # a row per line reads and diffs well
    with replacing(path) as temporary:
        temporary.write_text(f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')
    return path


def add_options(
    parser: argparse.ArgumentParser, providers: Iterable[str], limits: tuple[float, float] = (1440.0, 170.0)
) -> None:
    """Add the options that every comparison has; ``limits``: seconds of a whole run, in full and quick."""
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--providers", nargs="+", choices=list(providers))
    add("--no-compile", action="store_true", help="leave out what needs torch.compile")
    add("--threads", type=int, help="of torch on the CPU")
    add("--repeats", type=int, default=30, help="most rounds per cell; at least 5")
    add("--cell-seconds", type=float, help="of measured rounds, beyond the fewest of them")
    add(
        "--limit-seconds",
        type=float,
        help=f"start no cell after this long; default: {limits[0]:.0f}, if quick {limits[1]:.0f}",
    )
    add("--quick", action="store_true", help="a small selection and short cells")
    add("--results", type=Path, default=RESULTS, help="directory of the JSON file")
    parser.set_defaults(limits=limits)


def parse(
    parser: argparse.ArgumentParser, arguments: list[str], seconds: dict[str, tuple[float, float]]
) -> argparse.Namespace:
    """Parse, with defaults that depend on the device; ``seconds``: of a cell by device, in full and quick."""
    options = parser.parse_args(arguments)
    if options.cell_seconds is None:
        options.cell_seconds = seconds[options.device][options.quick]
    if options.limit_seconds is None:
        options.limit_seconds = options.limits[options.quick]
    return options


class Report:
    """What a run has measured, what it could not measure and why; and when it has to end."""

    def __init__(self, name: str, command: str, options: argparse.Namespace) -> None:
        self.name, self.command, self.options = name, command, options
        self.environment = environment()  # now, while the device can still be asked
        self.deadline = time.monotonic() + options.limit_seconds
        self.rows: list[dict[str, Any]] = []
        self.failures: list[dict[str, str]] = []
        self.unavailable: dict[str, str] = {}
        self.facts: dict[str, Any] = {}

    def late(self) -> bool:
        """Whether nothing more may be started."""
        return time.monotonic() > self.deadline

    def missing(self, what: str, reason: str) -> None:
        """Say once why something is left out."""
        if what not in self.unavailable:
            self.unavailable[what] = reason
            print(f"without {what}: {reason}")

    @contextlib.contextmanager
    def recorded(self, name: str, where: str) -> Iterator[None]:
        """Go on with the other providers when one fails; the failure is reported and fails the run.

        After an error that CUDA keeps (`lost_context`) every later figure would be a failure too: the run
        writes what it has and ends.
        """
        try:
            yield
        except Exception as error:
            message = first_line(error)
            self.failures.append({"provider": name, "where": where, "error": message})
            print(f"FAILED {name}: {message}")
            if reason := lost_context():
                print(f"the run ends here, its CUDA context is lost: {reason}")
                self.finish()

    def write(self) -> Path:
        """Write what there is so far."""
        return write_results(
            f"{self.name}_{self.options.device}",
            self.command,
            self.rows,
            directory=self.options.results,
            machine=self.environment,
            device=self.options.device,
            **self.facts,
            unavailable=self.unavailable,
            failures=self.failures,
        )

    def finish(self) -> None:
        """Write, name the failures, and exit with 1 if there are any."""
        print("->", self.write())
        for failure in self.failures:
            print(f"FAILED {failure['provider']} on {failure['where']}: {failure['error']}")
        if self.failures:
            raise SystemExit(1)


def table_line(label: str, figures: dict[str, str], columns: Iterable[str], width: int = 28) -> str:
    """One line of a printed table: a figure per column, under its name."""
    cells = (f"{figures.get(name, '-'):>{max(9, len(name)) + 1}}" for name in columns)
    return f"{label:{width}}{''.join(cells)}"

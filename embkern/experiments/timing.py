"""Paired timing: every provider is sampled once per round, so that noise falls on all of them alike."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

Sample = Callable[[], float]

# A shorter sample is mostly noise of the clock, so several calls share one sample.
MIN_SAMPLE_US = 200.0
MAX_CALLS_PER_SAMPLE = 64
MAX_WARMUP_SECONDS = 0.1
# Below about 100 us of device time a CUDA call is bound by its launch; eager time is up to ten times that.
GRAPH_BELOW_US = 1000.0


def synchronize(device: str) -> None:
    """Wait for a CUDA device; on the CPU there is nothing to wait for."""
    if device == "cuda":
        torch.cuda.synchronize()


def side_stream(device: str) -> contextlib.AbstractContextManager:
    """Return a context of a new CUDA stream: a CUDA graph cannot be captured on the default stream."""
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()


def sampler(device: str, calls: list[Callable[[], Any]]) -> tuple[Sample, str]:
    """Return ``cpu_sampler`` or ``cuda_sampler`` of the calls."""
    return cuda_sampler(calls) if device == "cuda" else cpu_sampler(calls)


def cpu_sampler(calls: list[Callable[[], Any]]) -> tuple[Sample, str]:
    """Return a function that times the next calls, in microseconds per call, and the timer's name.

    ``calls`` belong to one provider, one call per batch of inputs. Samples cycle through them, so that no
    timing is of a single batch that stays in cache.
    """
    turns = itertools.cycle(calls)

    def sample(count: int) -> float:
        batch = list(itertools.islice(turns, count))
        start = time.perf_counter()
        for call in batch:
            call()
        return (time.perf_counter() - start) * 1e6 / count

    start = time.perf_counter()
    for _ in calls:  # one warm-up pass over the batches, or a part of it where the calls are slow
        once = sample(1)
        if time.perf_counter() - start > MAX_WARMUP_SECONDS:
            break
    count = _calls_per_sample(once)
    return lambda: sample(count), "perf_counter"


def cuda_sampler(calls: list[Callable[[], Any]]) -> tuple[Sample, str]:
    """Like ``cpu_sampler``, with CUDA events; short calls are captured in one CUDA graph of all batches.

    The graph can only be captured within ``side_stream``.
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
    count = _calls_per_sample(timed(run, 1) * len(calls))
    return lambda: timed(run, count), timer


def _calls_per_sample(microseconds: float) -> int:
    return max(1, min(MAX_CALLS_PER_SAMPLE, round(MIN_SAMPLE_US / max(microseconds, 1e-3))))


def paired_rounds(
    samples: dict[str, Sample], *, seconds: float = 0.0, repeats: tuple[int, int]
) -> dict[str, list[float]]:
    """Take one sample of every provider per round, in a new random order each round.

    The k-th entries of all lists belong to one round: noise that lasts longer than a round cancels in their
    ratio. Rounds are added until ``seconds`` have passed, within the two bounds in ``repeats``.
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


def interleaved(
    providers: dict[str, Callable[[], Any]], *, repeats: int = 20, warmup: int = 3, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Time one call of every provider per round; for calls so long that a sample is one call.

    Returns microseconds per provider: median, p20 and p80.
    """

    def timed(call: Callable[[], Any]) -> float:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        return (time.perf_counter() - start) * 1e6

    samples: dict[str, Sample] = {name: functools.partial(timed, call) for name, call in providers.items()}
    rounds = warmup + repeats
    times = paired_rounds(samples, repeats=(rounds, rounds))
    return {name: quantiles(each[warmup:]) for name, each in times.items()}


def quantiles(times: list[float]) -> dict[str, float]:
    """Return the median, p20 and p80 of at least two times."""
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return {
        "median": round(statistics.median(times), 2),
        "p20": round(cuts[1], 2),
        "p80": round(cuts[7], 2),
    }


def paired_ratio(times: dict[str, list[float]], baseline: str, name: str) -> float:
    """Return how many times as fast ``name`` is as ``baseline``: the median of the ratios within a round."""
    ratios = (theirs / ours for theirs, ours in zip(times[baseline], times[name], strict=True))
    return round(statistics.median(ratios), 3)


def speedups(times: dict[str, list[float]], name: str, baselines: Iterable[str]) -> dict[str, Any]:
    """Return how many times as fast a provider is as its fastest baseline, by rounds and by medians."""
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

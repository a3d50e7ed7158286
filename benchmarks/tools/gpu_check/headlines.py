"""Stages 3 and 4: four cells beside what a user would run instead, eager; with ``--compiled``, compiled.

Providers of a cell are timed in paired rounds on several batches of inputs, embkern only after a check
against float64. A ratio is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embkern.experiments.timing import paired_ratio, paired_rounds, quantiles, sampler, side_stream
from embkern.ops import gather_project, packed_logits, reference
from embkern.tables.packed import TENSORS

from ...losses import PROVIDERS, TERMS, Batch, Check, mode_call
from ...machine import first_line
from ...packed_tables import random_packed_table
from ...peers import BOTH, two_step
from ...runner import assert_within, relative_error
from ...shapes import id_sets
from .lines import COMPILED_HEADLINE, HEADLINE, environment_of
from .place import Device
from .problems import Shape, _normal
from .timings import floor_of
from .workers import RIGHT, WRONG, Work

OURS = "embkern"
BATCHES = 8
SECONDS, ROUNDS = 1.0, (5, 30)
CHECKED_ROWS = 4096

Calls = list[Callable[[], Any]]


@dataclass
class Cell:
    """What is compared in one cell.

    Attributes:
        shape: of the inputs.
        dtype: of the tensors, as a key of the measured product rates.
        calls: by provider, a function that returns a call per batch of inputs.
        check: raises where embkern is wrong; returns its relative error.
        least_bytes: that any kernel has to move.
        least_flops: that any kernel needs.
    """

    shape: str
    dtype: str
    calls: dict[str, Callable[[], Calls]]
    check: Callable[[], float]
    least_bytes: float
    least_flops: float = 0.0


def _lookup(place: Device, compiled: bool, shape: Shape, small: Shape) -> Cell:
    """gather_project beside a dense table and two steps."""
    shape = small if place.rehearsal else shape
    N, H, r, V = shape.N, shape.H, shape.r, shape.V
    dtype = torch.float32 if place.rehearsal else torch.bfloat16
    generator = torch.Generator(place.type).manual_seed(0)
    floats = (_normal(generator, V, r), _normal(generator, r, H) / r**0.5, _normal(generator, H))
    codes, basis, offset = (each.to(dtype) for each in floats)
    sets = [ids.to(place.type) for ids in id_sets("zipf", V, N, sets=BATCHES)]

    def each(function: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], Calls]:
        return lambda: [functools.partial(function, ids, *tensors) for ids in sets]

    def check() -> float:
        exact = two_step(sets[0], codes.double(), basis.double(), offset.double())
        theirs = relative_error(two_step(sets[0], codes, basis, offset), exact)
        ours = relative_error(gather_project(sets[0], codes, basis, offset), exact)
        return assert_within([ours], [2 * theirs + 1e-7])

    calls = {OURS: each(gather_project, codes, basis, offset)}
    if compiled:
        faster = torch.compile(two_step, dynamic=False, fullgraph=True)
        calls["two-step compiled"] = each(faster, codes, basis, offset)
    else:
        calls["F.embedding"] = each(
            F.embedding, two_step(torch.arange(V, device=place.type), *floats).to(dtype)
        )
        calls["two-step"] = each(two_step, codes, basis, offset)
    distinct = sum(len(ids.unique()) for ids in sets) / len(sets)
    least = 8 * N + (distinct * r + (r + 1) * H + N * H) * dtype.itemsize
    kind = "fp32" if place.rehearsal else "bf16"
    return Cell(str(shape), kind, calls, check, least, 2 * distinct * r * H)


def _loss(place: Device, compiled: bool) -> Cell:
    """cosine_mse with its gradient beside the form in three dot products."""
    N, H = (64, 48) if place.rehearsal else (30522, 768)
    terms = TERMS["cosine+mse"]
    batches = [Batch.random(N, H, torch.float32, place.type, seed) for seed in range(BATCHES // 2)]

    def each(name: str) -> Callable[[], Calls]:
        return lambda: [mode_call(BOTH, PROVIDERS[name].build(terms), batch) for batch in batches]

    def check() -> float:
        return Check(batches[0], BOTH, terms)(PROVIDERS[OURS].build(terms))

    rivals = ("compiled", "three-dot-compiled") if compiled else ("eager", "three-dot")
    calls = {name: each(name) for name in (OURS, *rivals)}
    return Cell(f"{N}x{H}", "fp32", calls, check, 3 * N * H * 4)


def _head(place: Device, compiled: bool) -> Cell:
    """packed_logits of one hidden state beside a dense head."""
    V, H, K = (300, 96, 32) if place.rehearsal else (128256, 2048, 256)
    dtype = torch.float32 if place.rehearsal else torch.bfloat16
    table = random_packed_table(V, H, K, dtype).to(torch.device(place.type))
    tensors = [getattr(table, name) for name in TENSORS]
    generator = torch.Generator(place.type).manual_seed(0)
    states = [_normal(generator, 1, H).to(dtype) for _ in range(BATCHES)]

    def each(function: Callable[..., Tensor], *given: Tensor) -> Callable[[], Calls]:
        return lambda: [functools.partial(function, state, *given) for state in states]

    def check() -> float:
        ids = torch.arange(min(V, CHECKED_ROWS), device=place.type)

        def logits(cast: torch.dtype) -> Tensor:
            wide = [each.to(cast) for each in tensors[4:]]
            rows: Any = reference.gather_decode_forward
            return F.linear(states[0].to(cast), rows(ids, *tensors[:4], *wide, H, 1.0))

        exact = logits(torch.float64)
        ours = packed_logits(states[0], *tensors)[:, : len(ids)]
        theirs = relative_error(logits(dtype), exact)
        return assert_within([relative_error(ours, exact)], [2 * theirs + 1e-6])

    calls: dict[str, Callable[[], Calls]] = {OURS: each(packed_logits, *tensors)}
    dense = _normal(generator, V, H).to(dtype)
    head = torch.compile(F.linear, dynamic=False, fullgraph=True) if compiled else F.linear
    calls["F.linear compiled" if compiled else "F.linear"] = each(head, dense)
    least = sum(each.nbytes for each in tensors) + V * dtype.itemsize
    kind = "fp32" if place.rehearsal else "bf16"
    return Cell(f"1x{H} K={K} V={V}", kind, calls, check, least, 2.0 * V * K)


@dataclass(frozen=True)
class Headline:
    """A cell's constructor, and what the project wants of it."""

    make: Callable[[Device, bool], Cell]
    aim: str


HEADLINES = {
    "lookup": Headline(
        functools.partial(_lookup, shape=Shape(16384, 2048, 256, 128256), small=Shape(90, 64, 16, 200)),
        "1.5 x F.embedding, 1 x two-step compiled",
    ),
    "decoding": Headline(
        functools.partial(_lookup, shape=Shape(64, 2048, 256, 128256), small=Shape(3, 64, 16, 200)),
        "at most 1.5 us more than F.embedding",
    ),
    "loss": Headline(_loss, "85 % of the copy bandwidth, ratio 1.18"),
    "packed head": Headline(_head, "1 x F.linear"),
}


def _prepare(options: argparse.Namespace) -> Callable[[str], tuple[dict[str, Any], str | None]]:
    from .stand_in import place_of

    place, ceilings = place_of(options.rehearse), environment_of(options.results)
    return lambda name: compared_line(name, place, options.compiled, ceilings)


def compared_line(
    name: str, place: Device, compiled: bool, ceilings: dict[str, Any]
) -> tuple[dict[str, Any], str | None]:
    """Return the line of a cell, and why the process cannot continue, if so."""
    headline, faults = HEADLINES[name], {}
    line: dict[str, Any] = {"aim": headline.aim, "status": RIGHT}
    try:
        cell = headline.make(place, compiled)
        line.update(shape=cell.shape, dtype=cell.dtype, error=cell.check())
        samples = {}
        with side_stream(place.type):
            for provider, calls in cell.calls.items():
                try:
                    samples[provider], _ = sampler(place.type, calls())
                except Exception as error:  # a rival that fails does not stop the others
                    if provider == OURS or place.lost():
                        raise
                    faults[provider] = first_line(error)
            times = paired_rounds(samples, seconds=SECONDS, repeats=ROUNDS)
        line["us"] = {provider: quantiles(each) for provider, each in times.items()}
        line["times_as_fast_as"] = {each: paired_ratio(times, each, OURS) for each in times if each != OURS}
        floor = floor_of(cell.least_bytes, cell.least_flops, cell.dtype, ceilings)
        if floor is not None:
            line.update(floor=round(floor, 3), ratio=round(line["us"][OURS]["median"] / floor, 2))
    except Exception as error:
        return {**line, "status": WRONG, "why": first_line(error)}, place.lost()
    place.release()
    return {**line, "failed": faults} if faults else line, None


WORK = Work(
    module="headlines",
    description=__doc__,
    key=lambda options: COMPILED_HEADLINE if options.compiled else HEADLINE,
    names=lambda options: list(HEADLINES),
    prepare=_prepare,
    options=lambda parser: parser.add_argument("--compiled", action="store_true"),
)

if __name__ == "__main__":
    sys.exit(WORK.main(sys.argv[1:]))

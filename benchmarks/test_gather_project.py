"""The lookup under pytest-benchmark, from the same registry: `pytest benchmarks --benchmark-only`.

A small selection, to compare two states of the code (`--benchmark-autosave`, `--benchmark-compare`); one
group per case, one row per provider. `python -m benchmarks gather_project` is the full comparison.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from benchmarks.lookup_check import Check, mode_call
from benchmarks.peers import BOTH, FORWARD, PROVIDERS, Problem
from benchmarks.runner import DTYPES
from benchmarks.shapes import MODELS, id_sets

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    ("bert-base", 149, "fp32", FORWARD, 1),
    ("bert-base", 149, "fp32", FORWARD, 1024),
    ("bert-base", 149, "bf16", FORWARD, 1024),
    ("bert-base", 149, "fp32", BOTH, 1024),
]


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_gather_project(benchmark: Any, case: tuple[str, int, str, str, int], name: str) -> None:
    """Check one provider on one case, then time it on batches of Zipf ids in turn."""
    model, rank, dtype, mode, count = case
    provider = PROVIDERS[name]
    if mode not in provider.modes:
        pytest.skip(f"{name} has no {mode}")
    if reason := provider.reason(DEVICE, DTYPES[dtype]):
        pytest.skip(reason)
    benchmark.group = "-".join(map(str, case))
    torch._dynamo.reset()
    problem = Problem(MODELS[model], rank, DTYPES[dtype], DEVICE)
    sets = [ids.to(DEVICE) for ids in id_sets("zipf", problem.model.V, count, sets=8)]
    with torch.set_grad_enabled(mode != FORWARD):
        lookup = provider.build(problem)
        check = Check(problem, sets[0], mode)
        check(lookup, provider.allowed_factor)
        turns = itertools.cycle([mode_call(mode, lookup, ids, check.upstream) for ids in sets])

        def call() -> None:
            next(turns)()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark(call)

"""The loss under pytest-benchmark, from the same registry: `pytest benchmarks --benchmark-only`.

A small selection, to compare two states of the code (`--benchmark-autosave`, `--benchmark-compare`); one
group per case, one row per provider. `python -m benchmarks cosine_mse` is the full comparison.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from benchmarks.cosine_mse import Cell
from benchmarks.losses import PROVIDERS, TERMS, Batch, Check, mode_call
from benchmarks.peers import BOTH, FORWARD
from benchmarks.runner import DTYPES

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    Cell("cosine+mse", 32, 768, "fp32", FORWARD),
    Cell("cosine+mse", 32, 768, "fp32", BOTH),
    Cell("cosine+mse", 4096, 768, "fp32", BOTH),
    Cell("cosine+mse", 4096, 768, "bf16", BOTH),
    Cell("cosine+power", 4096, 768, "fp32", BOTH),
]


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, vars(case).values())))
def test_cosine_mse(benchmark: Any, case: Cell, name: str) -> None:
    """Check one provider on one case, then time it on several batches in turn."""
    provider, dtype, terms = PROVIDERS[name], DTYPES[case.dtype], TERMS[case.terms]
    if reason := provider.reason(DEVICE, dtype):
        pytest.skip(reason)
    benchmark.group = "-".join(map(str, vars(case).values()))
    torch._dynamo.reset()
    batches = [Batch.random(case.N, case.H, dtype, DEVICE, seed) for seed in range(8)]
    with torch.set_grad_enabled(case.mode != FORWARD):
        loss = provider.build(terms)
        Check(batches[0], case.mode, terms)(loss, provider.rival)
        turns = itertools.cycle([mode_call(case.mode, loss, batch) for batch in batches])

        def call() -> None:
            next(turns)()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark(call)

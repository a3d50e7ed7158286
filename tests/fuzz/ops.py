"""Helpers of the properties of ops: drawn ids, layouts and options, and the comparison of refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from embkern.ops.backends import unavailable
from tests.fuzz import Case, often
from tests.fuzz.tensors import LAYOUTS, VALUES, Refused, dtype_of, laid_out, outcome, spoiled

needs_extension = pytest.mark.skipif(
    unavailable("native", "gather_project", "cpu", torch.float32) is not None,
    reason="the extension is not built",
)
BACKENDS = ("native", "torch")


def backends_of(case: Case) -> tuple[str, ...]:
    """Return the native backend, and for one of four seeds the slower torch backend as well."""
    return BACKENDS[: 1 + (case["seed"] % 4 == 0)]


def finite_sum(*tensors: Tensor | None) -> float:
    """Sum the finite absolute values: an upper bound of what is lost where numbers flush to zero."""
    given = [each.double().abs() for each in tensors if each is not None]
    return sum(float(torch.where(each.isfinite(), each, 0.0).sum()) for each in given)


IDS_SHAPES = ((0,), (), (1,), (7,), (2, 3), (64,), (65,), (3, 0, 2), (130,))
SCALES = (1.0, 0.5, -3.0, 0.0, 1e-3, 1e4)


def ids_of(case: Case, count: int, generator: torch.Generator) -> Tensor:
    """Draw ids below ``count``: skewed to the first rows, only the first and the last, or all equal."""
    shape, kind = case["shape"], case["ids"]
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
    if kind == "skewed":
        drawn = drawn**3
    elif kind == "ends":
        drawn = drawn.round() * 0.999999
    elif kind == "same":
        drawn = drawn * 0 + 0.5
    return laid_out((drawn * count).to(dtype_of(case["ids_dtype"])), case["layouts"]["ids"])


def ids_case(random: Random) -> Case:
    """Draw what ``ids_of`` reads."""
    return dict(
        shape=random.choice(IDS_SHAPES),
        ids=random.choice(("skewed", "ends", "same")),
        ids_dtype=random.choice(("int64", "int32")),
    )


def layouts_case(random: Random, *names: str) -> dict[str, str]:
    """Draw a memory layout for each tensor."""
    return {name: often(random, "plain", *LAYOUTS) for name in names}


def values_case(random: Random, *names: str) -> dict[str, str]:
    """Draw a kind of values for each tensor."""
    return {name: often(random, "normal", *VALUES) for name in names}


def leaves_of(*tensors: Tensor | None) -> list[Tensor | None]:
    """Detach the tensors and make them require gradients."""
    return [None if each is None else each.detach().requires_grad_() for each in tensors]


def refused_alike(calls: dict[str, Callable[[], Any]], names: tuple[str, ...]) -> dict[str, Any]:
    """Call every backend and return the outcomes; either all raise the same kind of error, or none does."""
    results = {backend: outcome(call) for backend, call in calls.items()}
    if isinstance(results.get("native"), Refused) and "cannot serve" in results["native"].message:
        return results  # refused for the device or the dtype, which the other backend may support
    kinds = {
        backend: result.kind.__name__ if isinstance(result, Refused) else "result"
        for backend, result in results.items()
    }
    assert len(set(kinds.values())) == 1, f"backends differ: {results}"
    for backend, result in results.items():
        if isinstance(result, Refused):
            assert any(name in result.message for name in names), f"{backend} names no argument: {result}"
    return results


def spoil(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """Change arguments in the ways that the case drew with ``spoiling``."""
    for how in case["spoiling"]:
        arguments[how["name"]] = spoiled(arguments[how["name"]], how)
    return arguments


# Options that the losses refuse; the empty ones let a spoiled tensor be the only fault.
HOSTILE_OPTIONS = (
    {}, {}, {}, dict(alpha=0.0), dict(alpha=math.nan), dict(alpha=-1.0), dict(eps=0.0), dict(eps=math.nan),
    dict(eps=-1.0), dict(eps=math.inf), dict(reduction="median"), dict(cosine_weight=math.nan),
    dict(mse_weight=math.inf), dict(rmse_weight=-1.0), dict(alpha=1e300),
)  # fmt: skip


def loss_case(random: Random) -> Case:
    """Draw the options that ``cosine_mse_loss`` and ``autoencoder_loss`` share."""
    weights = random.choice(
        (
            (1.0, 1.0, 0.0, 0.0),
            (1.0, 0.0, 0.0, 0.0),
            (0.0, 1.0, 0.0, 0.0),
            (0.0, 0.0, 1.0, 0.0),
            (0.0, 0.0, 0.0, 1.0),
            (0.7, 0.3, 0.2, 0.4),
            (0.0, 0.0, 0.0, 0.0),
        )
    )
    return dict(
        weights=weights,
        alpha=random.choice((1.0, 0.1, 0.6, 2.0, 3.0)),
        eps=often(random, 1e-8, 1e-6, 1e-30, 1e-2),
        reduction=random.choice(("mean", "sum", "none")),
        row_weight=random.choice((None, None, "plain", "zeros")),
        target_norm=random.random() < 0.2,
        seed=random.randrange(1 << 32),
    )


def loss_options(case: Case) -> dict[str, Any]:
    """Return the keyword arguments of a loss."""
    names = ("cosine_weight", "mse_weight", "rmse_weight", "power_weight")
    return dict(
        zip(names, case["weights"], strict=True),
        alpha=case["alpha"],
        eps=case["eps"],
        reduction=case["reduction"],
    )

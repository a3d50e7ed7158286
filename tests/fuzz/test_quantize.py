"""``quantize_rows`` and ``quantize_trellis``: consistent codes, scales and projections; equal refusals."""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor

from embkern.methods.row_codes import scalar_levels, uniform_steps
from embkern.ops.packed_codes import packed_levels
from embkern.ops.packed_format import Tier
from embkern.ops.quantize_rows import quantize_rows
from embkern.ops.quantize_trellis import quantize_trellis
from tests.fuzz import Case, fuzz, often
from tests.fuzz.ops import (
    BACKENDS,
    backends_of,
    layouts_case,
    needs_extension,
    refused_alike,
    spoil,
)
from tests.fuzz.tensors import (
    Refused,
    Unchanged,
    generator_of,
    laid_out,
    make,
    same_bits,
    spoiling,
)
from tests.ops.packed_problems import values_of

pytestmark = needs_extension


def quantize_case(random: Random) -> Case:
    groups = random.choice((1, 1, 2, 3, 6))
    return dict(
        N=random.choice((0, 1, 2, 5, random.randint(1, 20))),
        bits=[random.randint(0, 8) for _ in range(groups)],
        tries=random.choice((1, 2, 5)),
        spread=random.random() < 0.4,
        values=often(random, "normal", "zeros", "ones", "rows", "nan", "inf"),
        layouts=layouts_case(random, "values", "spread", "bits", "levels", "steps", "factors", "scales"),
        needs_codes=random.random() < 0.7,
        seed=random.randrange(1 << 32),
    )


def quantize_trellis_case(random: Random) -> Case:
    case = quantize_case(random)
    return {**case, "bits": [bits % 5 for bits in case["bits"]], "N": case["N"] % 6}


def keeping(layout: str) -> str:
    """Replace the layouts that change values by one that keeps them."""
    return layout if layout not in ("expanded", "overlapping") else "stepped"


def quantized(case: Case, trellis: bool) -> dict[str, Tensor | None]:
    generator, width = generator_of(case["seed"]), 32 * len(case["bits"])
    layouts = {name: keeping(layout) for name, layout in case["layouts"].items()}
    arguments: dict[str, Tensor | None] = dict(
        values=make((case["N"], width), torch.float32, generator, case["values"], case["layouts"]["values"]),
        spread=laid_out(torch.rand(width, generator=generator) + 0.1, layouts["spread"])
        if case["spread"]
        else None,
        bits=laid_out(torch.tensor(case["bits"], dtype=torch.uint8), layouts["bits"]),
    )
    if trellis:
        arguments["levels"] = laid_out(levels_of(case), layouts["levels"])
        scales = torch.rand(case["N"], case["tries"], generator=generator) + 0.5
        arguments["scales"] = laid_out(scales, case["layouts"]["scales"])
        return arguments
    arguments["levels"] = laid_out(scalar_levels(), layouts["levels"])
    arguments["steps"] = laid_out(uniform_steps(), layouts["steps"])
    factors = torch.rand(case["tries"], generator=generator) + 0.5
    arguments["factors"] = laid_out(factors, case["layouts"]["factors"])
    return arguments


def levels_of(case: Case) -> Tensor:
    """Levels (17, 16) int8: those that tables have, or any, whose sums wrap around."""
    if case["seed"] % 4:
        return packed_levels()
    return torch.randint(-128, 128, (17, 16), generator=generator_of(case["seed"])).to(torch.int8)


def decoded(codes: Tensor, case: Case, trellis: bool) -> Tensor:
    bits, parts = case["bits"], []
    if trellis:
        return values_of(codes, Tier(False, tuple(bits)), levels_of(case))
    for width, part in zip(bits, codes.long().split(32, 1), strict=True):
        if width == 0:
            parts.append(torch.zeros(part.shape, dtype=torch.float64))
        elif width > 4:
            parts.append(part - (2**width - 1) / 2)
        else:
            parts.append(scalar_levels()[width - 1].double()[part] / 4096)
    return torch.cat(parts, 1)


def check_quantize(case: Case, trellis: bool) -> None:
    function = quantize_trellis if trellis else quantize_rows
    arguments = quantized(case, trellis)
    values, bits = arguments["values"], case["bits"]
    results = {}
    for backend in backends_of(case) if not trellis or case["seed"] % 16 == 0 else ("native",):
        with Unchanged(*arguments.values()):
            results[backend] = function(**arguments, needs_codes=True, backend=backend)
            if backend == "native":
                assert same_bits(results[backend], function(**arguments, needs_codes=True, backend=backend))
            if backend == "native" and not case["needs_codes"]:
                none, *rest = function(**arguments, needs_codes=False, backend=backend)
                assert none.shape == (0, values.shape[1])
                assert same_bits(rest, results[backend][1:])
    weight = 1.0 if arguments["spread"] is None else arguments["spread"].double()
    x = values.double() * weight
    # Outside this range the squares overflow or underflow in fp32, and the row itself is not checked.
    norm = x.norm(dim=1)
    usable = x.isfinite().all(1) & ((norm == 0) | ((norm > 1e-12) & (norm < 1e15)))
    for backend, (codes, scales, projections) in results.items():
        limits = torch.tensor(bits).repeat_interleave(32)
        assert bool((codes.long() < 1 << limits).all()), f"{backend}: a code has too many bits"
        d = decoded(codes, case, trellis) * weight
        square, dot = d.square().sum(1), (x * d).sum(1)
        tolerance = 1e-5 * norm * d.norm(dim=1) + 1e-30
        assert bool((~usable | ((scales.double() * square - dot).abs() <= tolerance)).all()), (
            f"{backend} scales"
        )
        error = (projections.double() * square.sqrt() - dot).abs()
        assert bool((~usable | (error <= tolerance)).all()), f"{backend} projections"
    best = {backend: result[2].double() for backend, result in results.items()}
    # Ties between paths or levels may be broken differently, and so may the start state of a trellis.
    apart = (best["native"] - best.get("torch", best["native"])).abs() > (
        0.2 if trellis else 1e-4
    ) * norm + 1e-30
    assert not bool((usable & apart).any()), "backends find projections that differ"
    alone = [i for i in range(len(values)) if bool(usable[i])][:1]
    for row in alone:
        single = {
            name: each[row : row + 1] if name == "values" or (name == "scales" and trellis) else each
            for name, each in arguments.items()
        }
        got = function(**single, needs_codes=True, backend="native")
        assert same_bits(got, [each[row : row + 1] for each in results["native"]]), "a row depends on others"


@fuzz(quantize_case)
def test_quantize_rows(case):
    check_quantize(case, trellis=False)


@fuzz(quantize_trellis_case)
def test_quantize_trellis(case):
    check_quantize(case, trellis=True)


def quantize_refused_case(random: Random) -> Case:
    trellis = random.random() < 0.3
    names = ("values", "spread", "bits", "levels", *(("scales",) if trellis else ("steps", "factors")))
    return dict(
        **(quantize_trellis_case if trellis else quantize_case)(random),
        trellis=trellis,
        spoiling=[spoiling(random, names) for _ in range(random.choice((1, 1, 2)))],
    )


@fuzz(quantize_refused_case)
def test_quantize_refuses_alike(case):
    function = quantize_trellis if case["trellis"] else quantize_rows
    arguments = spoil(quantized(case, case["trellis"]), case)
    if any(each is None for name, each in arguments.items() if name != "spread"):
        return
    backends = BACKENDS if arguments["values"].dtype == torch.float32 else ("torch",)
    calls = {
        backend: lambda backend=backend: function(
            **arguments, needs_codes=case["needs_codes"], backend=backend
        )
        for backend in backends
    }
    results = refused_alike(calls, (*arguments, "quantize_rows", "quantize_trellis"))
    if len(results) == 2 and not isinstance(results["native"], Refused):
        for native, plain in zip(*results.values(), strict=True):
            assert (native.shape, native.dtype) == (plain.shape, plain.dtype)

"""``gather_project`` on drawn arguments: errors within rounding, and the same refusals in every backend."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import torch
from torch import Tensor

from embkern.ops import gather_project
from tests.fuzz import Case, fuzz, often
from tests.fuzz.ops import (
    BACKENDS,
    SCALES,
    backends_of,
    finite_sum,
    ids_case,
    ids_of,
    layouts_case,
    leaves_of,
    needs_extension,
    refused_alike,
    spoil,
    values_case,
)
from tests.fuzz.tensors import (
    FLOATS,
    Unchanged,
    assert_within,
    dtype_of,
    generator_of,
    make,
    rounding,
    same_bits,
    spoiling,
)

pytestmark = needs_extension


def gather_project_case(random: Random) -> Case:
    return dict(
        **ids_case(random),
        V=random.choice((1, 2, 17, 40, random.randint(1, 99))),
        r=random.choice((0, 1, 7, 16, 33, random.randint(1, 70))),
        H=random.choice((0, 1, 5, 16, 31, 64, random.randint(1, 300))),
        dtype=random.choice(FLOATS),
        layouts=layouts_case(random, "ids", "codes", "basis", "offset", "grad"),
        values=values_case(random, "codes", "basis", "offset", "grad"),
        offset=random.random() < 0.6,
        scale=often(random, 1.0, *SCALES),
        padding=random.choice((None, None, 0, -1)),
        sparse=random.random() < 0.3,
        seed=random.randrange(1 << 32),
    )


def projected(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor | None, torch.Generator]:
    generator, dtype = generator_of(case["seed"]), dtype_of(case["dtype"])
    shapes = dict(codes=(case["V"], case["r"]), basis=(case["r"], case["H"]), offset=(case["H"],))
    codes, basis, offset = (
        make(shape, dtype, generator, case["values"][name], case["layouts"][name])
        for name, shape in shapes.items()
    )
    ids = ids_of(case, case["V"], generator)
    return ids, codes, basis, offset if case["offset"] else None, generator


@fuzz(gather_project_case)
def test_gather_project(case):
    ids, codes, basis, offset, generator = projected(case)
    dtype, scale, padding = codes.dtype, case["scale"], case["padding"]
    out_unit, unit, flush = rounding(dtype)
    flat, C, B = ids.reshape(-1).long(), codes.double(), basis.double()
    b = torch.zeros(case["H"], dtype=torch.float64) if offset is None else offset.double()
    rows = C[flat]
    exact = scale * (rows @ B + b)
    sizes = rows.abs() @ B.abs() + b.abs()
    lost = flush * (2 + finite_sum(C, B)) * (1 + abs(scale))
    bound = out_unit * exact.abs() + 2 * (case["r"] + 3) * unit * abs(scale) * sizes + lost
    most = sizes * max(1, abs(scale))
    shape = (*ids.shape, case["H"])

    grad = make(shape, dtype, generator, case["values"]["grad"], case["layouts"]["grad"])
    g = grad.double().reshape(len(flat), case["H"])
    if padding is not None:
        g = g.masked_fill((flat == padding % case["V"]).unsqueeze(1), 0)
    # Each gradient, and the sum of the absolute values of its terms.
    gradients = []
    for G, left, right in ((g, rows, B), (g.abs(), rows.abs(), B.abs())):
        summed = torch.zeros(case["V"], case["H"], dtype=torch.float64).index_add(0, flat, G)
        gradients.append([summed @ right.t(), left.t() @ G, G.sum(0)])
    # Rows that are not looked up have a gradient of 0 even where the basis is NaN.
    looked_up = torch.zeros(case["V"], dtype=torch.bool)
    looked_up[flat if padding is None else flat[flat != padding % case["V"]]] = True
    gradients[0][0][~looked_up] = 0
    narrow = dtype in (torch.bfloat16, torch.float16)
    terms = len(flat) + case["H"] + 4
    spread = flush * (4 + finite_sum(g, C, B)) * (1 + abs(scale)) * terms

    for backend in backends_of(case):
        options = dict(scale=scale, padding_idx=padding, sparse=case["sparse"], backend=backend)
        with Unchanged(ids, codes, basis, offset, grad):
            got = gather_project(ids, codes, basis, offset, **options)
            # The torch backend may round the product before it adds the offset.
            within = bound + out_unit * abs(scale) * sizes * 2 if narrow and backend == "torch" else bound
            assert_within(got.reshape(exact.shape), exact, within, most, f"{backend} rows", scale != 0)
            leaves = leaves_of(codes, basis, offset)
            again = gather_project(ids, *leaves, **options)
            assert same_bits(got, again.detach())
            inputs = [each for each in leaves if each is not None]
            grads = torch.autograd.grad(again, inputs, grad, retain_graph=True)
            if backend == "native":
                assert all(map(same_bits, grads, torch.autograd.grad(again, inputs, grad)))
                out = torch.full(shape, float("nan"), dtype=dtype)
                assert gather_project(ids, codes, basis, offset, scale=scale, out=out, backend=backend) is out
                assert same_bits(got, out)
        for name, each, want, size in zip(("codes", "basis", "offset"), grads, *gradients, strict=False):
            each = each.to_dense() if each.is_sparse else each
            # The sum over repeated ids may be rounded before the product; torch rounds each position's term.
            within = (8 * out_unit if narrow else out_unit) * size + 4 * terms * unit * size
            if backend == "torch" and case["sparse"]:
                # Its sparse gradient has a row per position; coalescing adds them in their own dtype.
                within = within + len(flat) * out_unit * size
            assert_within(
                each,
                scale * want,
                abs(scale) * within + spread,
                size * max(1, abs(scale)) * (1 + (g.abs().max() if len(g) and case["H"] else 0)),
                f"{backend} gradient of {name}",
                scale != 0
                and padding
                is None,  # with a scale of 0 or a padding row, products with non-finite values may be skipped
            )


PROJECT_NAMES = ("ids", "codes", "basis", "offset")


def gather_project_refused_case(random: Random) -> Case:
    case = gather_project_case(random)
    case["values"] = dict.fromkeys(case["values"], "normal")
    case["spoiling"] = [spoiling(random, PROJECT_NAMES) for _ in range(random.choice((1, 1, 2)))]
    case["options"] = random.choice(
        (
            {},
            {},
            dict(padding_idx=random.choice((case["V"], -case["V"] - 1, 2**70, 0))),
            dict(scale=random.choice((math.nan, math.inf))),
            dict(out=random.choice(("wrong dtype", "wrong shape", "strided", "right"))),
        )
    )
    case["grad"] = random.random() < 0.5
    return case


@fuzz(gather_project_refused_case)
def test_gather_project_refuses_alike(case):
    ids, codes, basis, offset, _ = projected(case)
    arguments = spoil(dict(ids=ids, codes=codes, basis=basis, offset=offset), case)
    if any(arguments[name] is None for name in ("ids", "codes", "basis")):
        return  # the ops promise nothing for arguments that are not tensors
    options = dict(case["options"])
    tensors = [each for each in arguments.values() if each is not None]
    if (out := options.get("out")) is not None:
        shape = (*arguments["ids"].shape, arguments["basis"].shape[-1] if arguments["basis"].dim() else 1)
        wide = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=codes.dtype)
        options["out"] = {
            "wrong dtype": lambda: torch.zeros(shape, dtype=torch.int32),
            "wrong shape": lambda: torch.zeros(*shape, 1, dtype=codes.dtype),
            "strided": lambda: wide[..., ::2],
            "right": lambda: torch.zeros(shape, dtype=codes.dtype),
        }[out]()
    if case["grad"]:
        arguments = {
            name: each.detach().requires_grad_() if each is not None and each.is_floating_point() else each
            for name, each in arguments.items()
        }

    def call(backend: str) -> Any:
        result = gather_project(**arguments, **options, backend=backend)
        if result.requires_grad and not result.is_meta:
            result.sum().backward()
        return result.detach().clone()

    with Unchanged(*tensors) if out is None else Unchanged():
        results = refused_alike(
            {backend: lambda backend=backend: call(backend) for backend in BACKENDS},
            (*PROJECT_NAMES, "out", "padding_idx", "scale", "sparse", "gather_project"),
        )
    native, torch_ = results.values()
    if isinstance(native, Tensor):
        assert native.shape == torch_.shape
        assert native.dtype == torch_.dtype

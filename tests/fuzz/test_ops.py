"""The public ops on drawn arguments: right within what the arithmetic allows, or refused alike everywhere."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from embkern.methods.allocate import scalar_levels, uniform_steps
from embkern.ops import autoencoder_loss, cosine_mse_loss, gather_decode, gather_project, reference
from embkern.ops.backends import unavailable
from embkern.ops.packed_format import (
    Tier,
    directory_of,
    packed_values,
    trellis_levels,
    trellis_states,
    words_of_rows,
)
from embkern.ops.quantize_rows import quantize_rows
from embkern.ops.quantize_trellis import quantize_trellis
from tests.fuzz import Case, fuzz, often
from tests.fuzz.tensors import (
    FLOATS,
    LAYOUTS,
    VALUES,
    Refused,
    Unchanged,
    assert_within,
    dtype_of,
    generator_of,
    laid_out,
    make,
    outcome,
    rounding,
    same_bits,
    spoiled,
    spoiling,
)

pytestmark = pytest.mark.skipif(
    unavailable("native", "gather_project", "cpu", torch.float32) is not None,
    reason="the extension is not built",
)
BACKENDS = ("native", "torch")


def backends_of(case: Case) -> tuple[str, ...]:
    """The native kernel, and in one of four cases its definition, which is slower."""
    return BACKENDS[: 1 + (case["seed"] % 4 == 0)]


def finite_sum(*tensors: Tensor | None) -> float:
    """The sum of the absolute values that are finite: what may be lost where some numbers flush to zero."""
    given = [each.double().abs() for each in tensors if each is not None]
    return sum(float(torch.where(each.isfinite(), each, 0.0).sum()) for each in given)


IDS_SHAPES = ((0,), (), (1,), (7,), (2, 3), (64,), (65,), (3, 0, 2), (130,))
SCALES = (1.0, 0.5, -3.0, 0.0, 1e-3, 1e4)


def ids_of(case: Case, count: int, generator: torch.Generator) -> Tensor:
    """Ids of one of the kinds: skewed to the front, at the ends, all the same."""
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
    return dict(
        shape=random.choice(IDS_SHAPES),
        ids=random.choice(("skewed", "ends", "same")),
        ids_dtype=random.choice(("int64", "int32")),
    )


def layouts_case(random: Random, *names: str) -> dict[str, str]:
    return {name: often(random, "plain", *LAYOUTS) for name in names}


def values_case(random: Random, *names: str) -> dict[str, str]:
    return {name: often(random, "normal", *VALUES) for name in names}


def leaves_of(*tensors: Tensor | None) -> list[Tensor | None]:
    """The same views as leaves of a graph."""
    return [None if each is None else each.detach().requires_grad_() for each in tensors]


# ---- gather_project ----------------------------------------------------------------------------------


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
    # What each gradient is, and the sum of the absolute values of its terms.
    gradients = []
    for G, left, right in ((g, rows, B), (g.abs(), rows.abs(), B.abs())):
        summed = torch.zeros(case["V"], case["H"], dtype=torch.float64).index_add(0, flat, G)
        gradients.append([summed @ right.t(), left.t() @ G, G.sum(0)])
    # Rows that are not looked up have a gradient of 0, whatever the basis.
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
            # Plain torch may round the product before it adds the offset.
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
            # A sum of repeated ids may be rounded before the product, and plain torch rounds each position's.
            within = (8 * out_unit if narrow else out_unit) * size + 4 * terms * unit * size
            if backend == "torch" and case["sparse"]:
                # It has a row for each position of an id, which torch adds up in their dtype.
                within = within + len(flat) * out_unit * size
            assert_within(
                each,
                scale * want,
                abs(scale) * within + spread,
                size * max(1, abs(scale)) * (1 + (g.abs().max() if len(g) and case["H"] else 0)),
                f"{backend} gradient of {name}",
                scale != 0 and padding is None,  # 0 times what is not finite need not be computed
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


def refused_alike(calls: dict[str, Callable[[], Any]], names: tuple[str, ...]) -> dict[str, Any]:
    """Call every backend; all must refuse the arguments with the same kind of error, or none."""
    results = {backend: outcome(call) for backend, call in calls.items()}
    if isinstance(results.get("native"), Refused) and "cannot serve" in results["native"].message:
        return results  # of the device or the dtype that decides: another backend has its own say
    kinds = {
        backend: result.kind.__name__ if isinstance(result, Refused) else "result"
        for backend, result in results.items()
    }
    assert len(set(kinds.values())) == 1, f"backends differ: {results}"
    for backend, result in results.items():
        if isinstance(result, Refused):
            assert any(name in result.message for name in names), f"{backend} names nothing: {result}"
    return results


def spoil(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    for how in case["spoiling"]:
        arguments[how["name"]] = spoiled(arguments[how["name"]], how)
    return arguments


@fuzz(gather_project_refused_case)
def test_gather_project_refuses_alike(case):
    ids, codes, basis, offset, _ = projected(case)
    arguments = spoil(dict(ids=ids, codes=codes, basis=basis, offset=offset), case)
    if any(arguments[name] is None for name in ("ids", "codes", "basis")):
        return  # not a tensor: nothing is promised
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


# ---- gather_decode -----------------------------------------------------------------------------------


def gather_decode_case(random: Random) -> Case:
    H = random.choice((1, 7, 31, 32, 33, 64, 65, random.randint(1, 130)))
    K = random.choice((0, 0, 32, 64, 96))
    groups, terms = -(-H // 32), K // 32
    tiers = []
    for _ in range(random.choice((1, 2, 5, 16))):
        transform = bool(terms) and random.random() < 0.5
        bits = [random.randint(0, 8) for _ in range(random.randint(0, terms if transform else groups))]
        tiers.append((transform, tuple(bits)))
    return dict(
        **ids_case(random),
        V=random.choice((1, 31, 32, 33, 64, random.randint(1, 150))),
        H=H,
        K=K,
        tiers=tiers,
        dtype=random.choice(FLOATS),
        layouts=layouts_case(
            random, "ids", "records", "directory", "tiers", "levels", "scales", "basis", "offset", "grad"
        ),
        values=values_case(random, "scales", "basis", "offset", "grad"),
        offset=random.random() < 0.6,
        scale=often(random, 1.0, *SCALES),
        padding=random.choice((None, None, 0, -1)),
        seed=random.randrange(1 << 32),
    )


def packed(case: Case) -> tuple[dict[str, Tensor | None], torch.Generator]:
    """The tensors of a table of random records: every bit pattern is one."""
    generator, dtype = generator_of(case["seed"]), dtype_of(case["dtype"])
    V, H, K = case["V"], case["H"], case["K"]
    tiers = [Tier(*each) for each in case["tiers"]]
    groups = max(1, *(len(tier.bits) for tier in tiers), 1)
    tier_of = torch.randint(len(tiers), (V,), generator=generator)
    words = max(1, int(words_of_rows(tier_of, tiers).sum()))
    described = [[int(t.transform), *t.bits, *[0] * (groups - len(t.bits))] for t in tiers]
    tensors: dict[str, Tensor | None] = dict(
        records=torch.randint(-(2**31), 2**31, (words,), generator=generator).to(torch.int32),
        directory=directory_of(tier_of, tiers),
        tiers=torch.tensor(described, dtype=torch.uint8),
        levels=torch.randint(-(2**15), 2**15, (4, 128), generator=generator).to(torch.int16),
    )
    for name, tensor in tensors.items():
        layout = case["layouts"][name]  # values must stay
        tensors[name] = laid_out(tensor, layout if layout not in ("expanded", "overlapping") else "stepped")
    for name, shape in dict(scales=(V,), basis=(K, H), offset=(H,)).items():
        tensors[name] = make(shape, dtype, generator, case["values"][name], case["layouts"][name])
    if not K:
        tensors["basis"] = None
    if not case["offset"]:
        tensors["offset"] = None
    return tensors, generator


@fuzz(gather_decode_case)
def test_gather_decode(case):
    tensors, generator = packed(case)
    ids = ids_of(case, case["V"], generator)
    scales, basis, offset = (tensors[name] for name in ("scales", "basis", "offset"))
    dtype, scale, padding, H = scales.dtype, case["scale"], case["padding"], case["H"]
    out_unit, unit, flush = rounding(dtype)
    flat = ids.reshape(-1).long()
    codes = [tensors[name].contiguous() for name in ("records", "directory", "tiers", "levels")]
    transform, values = packed_values(flat, *codes)
    values = values.double()
    factor = scales.double()[flat].unsqueeze(1)
    b = torch.zeros(H, dtype=torch.float64) if offset is None else offset.double()
    direct = torch.nn.functional.pad(values, (0, max(0, H - values.shape[1])))[:, :H]
    row, size = direct, direct.abs()
    if basis is not None:
        coefficients = torch.nn.functional.pad(values, (0, max(0, case["K"] - values.shape[1])))
        coefficients = coefficients[:, : case["K"]]
        at = transform.unsqueeze(1)
        row = torch.where(at, coefficients @ basis.double(), row)
        size = torch.where(at, coefficients.abs() @ basis.double().abs(), size)
    exact = scale * (factor * row + b)
    sizes = factor.abs() * size + b.abs()
    # In bf16 the coefficients times their scale, and the basis, are what the product multiplies.
    product = 2 * out_unit if dtype in (torch.bfloat16, torch.float16) else 0
    within = out_unit * exact.abs() + abs(scale) * (2 * (case["K"] + 6) * unit + product) * sizes
    # A product in another order may leave the range where the sum does not: scales of any size are drawn.
    lost = flush * (4 + size + factor.abs()) * (1 + abs(scale)) * (1 + case["K"]) * 256
    most = torch.maximum(sizes, torch.maximum(size, factor.abs() * 128)) * max(1, abs(scale)) * 256
    lost = lost + flush * finite_sum(basis) * 256
    grad = make((*ids.shape, H), dtype, generator, case["values"]["grad"], case["layouts"]["grad"])
    g = grad.double().reshape(-1, H) * scale
    if padding is not None:
        g = g.masked_fill((flat == padding % case["V"]).unsqueeze(1), 0)
    gradients = {}
    for kind, (G, rows, f, c) in dict(
        exact=(g, row, factor, values), size=(g.abs(), size, factor.abs(), values.abs())
    ).items():
        per_row = torch.zeros(case["V"], dtype=torch.float64).index_add(0, flat, (rows * G).sum(1))
        gradients[kind] = [per_row]
        if basis is not None:
            c = torch.nn.functional.pad(c, (0, max(0, case["K"] - c.shape[1])))[:, : case["K"]]
            gradients[kind].append((c * torch.where(transform.unsqueeze(1), f, 0.0)).t() @ G)
        gradients[kind].append(G.sum(0))
    terms = 4 * (len(flat) + H + case["K"] + 8)
    for backend in backends_of(case):
        options = dict(embedding_dim=H, scale=scale, padding_idx=padding, backend=backend)
        with Unchanged(ids, grad, *tensors.values()):
            got = gather_decode(ids, **tensors, **options)
            assert_within(got.reshape(exact.shape), exact, within + lost, most, f"{backend} rows", scale != 0)
            assert same_bits(got, gather_decode(ids, **tensors, **options))
            leaves = {
                name: each.detach().requires_grad_()
                for name, each in dict(scales=scales, basis=basis, offset=offset).items()
                if each is not None
            }
            again = gather_decode(ids, **{**tensors, **leaves}, **options)
            assert same_bits(got, again.detach())
            grads = torch.autograd.grad(again, list(leaves.values()), grad)
        for name, each, want, amount in zip(
            leaves, grads, gradients["exact"], gradients["size"], strict=False
        ):
            spread = out_unit * want.abs() + terms * unit * amount + flush * terms * 256 * (1 + abs(scale))
            assert_within(
                each,
                want,
                spread + flush * finite_sum(basis, grad, scales),
                amount * 256,
                f"{backend} gradient of {name}",
            )


PACKED_NAMES = ("records", "directory", "tiers", "levels", "scales", "basis", "offset")


def gather_decode_refused_case(random: Random) -> Case:
    case = gather_decode_case(random)
    case["values"] = dict.fromkeys(case["values"], "normal")
    case["spoiling"] = [spoiling(random, ("ids", *PACKED_NAMES)) for _ in range(random.choice((1, 1, 2)))]
    case["width"] = often(random, case["H"], 0, -1, case["H"] + 1, case["H"] - 1, 2**31, 2**62, -(2**63))
    return case


@fuzz(gather_decode_refused_case)
def test_gather_decode_refuses_alike(case):
    tensors, generator = packed(case)
    ids = ids_of(case, case["V"], generator)
    arguments = spoil(dict(ids=ids, **tensors), case)
    if any(arguments[name] is None for name in ("ids", *PACKED_NAMES[:5])):
        return
    if case["width"] == 2**31 and arguments["ids"].numel():
        case = {**case, "width": 2**62}  # not 8 GiB a row, where nothing refuses it
    # Tiers that reach beyond the row or the basis, and records beyond their end, are the table's to refuse.
    spoilt = {how["name"] for how in case["spoiling"]}
    damaged = bool(spoilt & {"directory", "tiers", "records", "basis"}) or 0 < case["width"] != case["H"]
    calls = {
        backend: lambda backend=backend: gather_decode(
            **arguments, embedding_dim=case["width"], backend=backend
        )
        for backend in BACKENDS
    }
    names = ("ids", *PACKED_NAMES, "embedding_dim", "gather_decode")
    if damaged:
        for backend, call in calls.items():
            # An allocation that fails says so in torch's words.
            outcome(call, (*names, "API") if backend == "native" else ())
        return
    results = refused_alike(calls, names)
    native, plain = results.values()
    if isinstance(native, Tensor):
        assert (native.shape, native.dtype) == (plain.shape, plain.dtype)


# ---- cosine_mse_loss ---------------------------------------------------------------------------------


def loss_case(random: Random) -> Case:
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


def cosine_mse_case(random: Random) -> Case:
    dtype = random.choice(FLOATS)
    return dict(
        shape=random.choice(((0,), (1,), (), (5,), (2, 3), (40,), (3, 0), (random.randint(1, 30),))),
        H=random.choice((1, 2, 15, 16, 17, 64, random.randint(1, 200))),
        dtypes=(dtype, often(random, dtype, *FLOATS)),
        layouts=layouts_case(random, "output", "target", "row_weight"),
        values=values_case(random, "output", "target"),
        close=often(random, 0.5, 0.0, 1e-3),
        **loss_case(random),
    )


def compared(case: Case) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    generator, shape = generator_of(case["seed"]), (*case["shape"], case["H"])
    pair = []
    for name, dtype in zip(("output", "target"), case["dtypes"], strict=True):
        pair.append(make(shape, dtype_of(dtype), generator, case["values"][name], case["layouts"][name]))
    if case["close"] < 0.5 and case["values"]["output"] == "normal":
        near = pair[1].double() * (1 + case["close"] * torch.randn(shape, generator=generator).double())
        pair[0] = laid_out(near.to(pair[0].dtype), case["layouts"]["output"])
    weight = None
    if case["row_weight"] is not None:
        weight = torch.rand(shape[:-1], generator=generator)
        if case["row_weight"] == "zeros" and weight.numel() > 1:
            weight.view(-1)[1:] *= (weight.view(-1)[1:] > 0.5).float()
        weight = laid_out(weight, case["layouts"]["row_weight"])
    wide = torch.promote_types(pair[0].dtype, pair[1].dtype)
    norm = (
        pair[1].double().norm(dim=-1).to(reference.accumulation_dtype(wide)) if case["target_norm"] else None
    )
    return pair[0], pair[1], weight, norm


def loss_options(case: Case) -> dict[str, Any]:
    names = ("cosine_weight", "mse_weight", "rmse_weight", "power_weight")
    return dict(
        zip(names, case["weights"], strict=True),
        alpha=case["alpha"],
        eps=case["eps"],
        reduction=case["reduction"],
    )


@fuzz(cosine_mse_case)
def test_cosine_mse_loss(case):
    output, target, weight, norm = compared(case)
    dtype, H, options = torch.promote_types(output.dtype, target.dtype), case["H"], loss_options(case)
    out_unit, unit, flush = rounding(dtype)
    y, x = (each.to(dtype).double().reshape(-1, H) for each in (output, target))
    w = None if weight is None else weight.double().reshape(-1)
    known = None if norm is None else norm.double().reshape(-1)
    rank = reference.REDUCTIONS.index(case["reduction"])
    loss, *exact = reference.cosine_mse_forward(
        y, x, w, known, None, rank, *case["weights"], case["alpha"], case["eps"], True, norm is None
    )
    # The sum of the absolute values of what makes up the loss and each gradient.
    e, count = y - x, len(y)
    factor = torch.ones(count, dtype=torch.float64) if w is None else w.abs()
    if case["reduction"] == "mean" and count:
        factor = factor / (count if w is None else w.sum())
    y_norm, x_norm = y.norm(dim=1), x.norm(dim=1) if known is None else known
    product = y_norm * x_norm
    cosine_weight, mse_weight, rmse_weight, power_weight = case["weights"]
    power = (e.abs() + reference.POWER_BIAS).pow(case["alpha"])
    mse = e.square().mean(1)
    size = factor * (2 * cosine_weight + mse_weight * mse + power_weight * power.mean(1))
    one_root = case["reduction"] == "mean"
    root = (factor * mse).sum().sqrt() if one_root else mse.sqrt()
    if not one_root:
        size = size + factor * rmse_weight * root
    sizes = size if case["reduction"] == "none" else size.sum() + (rmse_weight * root if one_root else 0)
    terms = 4 * (H + count + 30)
    # Rows on either side of eps, and rows with no direction in the sums' range, may be either kind.
    ordinary = ((product < 0.99 * case["eps"]) | (product > 1.01 * case["eps"])) & (product.isfinite())
    accumulation = torch.finfo(reference.accumulation_dtype(dtype))
    if dtype != torch.float64:
        ordinary &= (product == 0) | (product > 1e-30)
    else:
        ordinary &= (product == 0) | (product > 1e-290)
    if not cosine_weight:
        ordinary = torch.ones_like(ordinary)
    # A row whose terms overflow is no row of weight 0 either.
    ordinary &= (mse_weight * mse + power_weight * power.sum(1)) * 16 < accumulation.max
    relative = out_unit if dtype == torch.float64 else unit
    tiny = accumulation.smallest_normal * 16 * (1 + H)
    checked = ordinary if case["reduction"] == "none" else ordinary.all()
    shape = output.shape[:-1] if case["reduction"] == "none" else ()
    # With every weight 0 no term is computed, and one of weight 0 is not.
    broken = (y.isnan() | x.isnan()).any(1) & (factor > 0) & (sum(case["weights"]) > 0)

    for backend in backends_of(case):
        with Unchanged(output, target, weight, norm):
            got = cosine_mse_loss(
                output, target, **options, row_weight=weight, target_norm=norm, backend=backend
            )
            assert got.shape == shape
            assert got.dtype == reference.accumulation_dtype(dtype)
            assert_within(
                got.reshape(loss.shape),
                torch.where(checked, loss, math.inf),
                terms * relative * sizes + tiny,
                sizes * 4,
                f"{backend} loss",
                broken.any() if case["reduction"] != "none" else broken,
            )
            leaves = leaves_of(output, target if norm is None else None)
            again = cosine_mse_loss(
                leaves[0], target if norm is not None else leaves[1], **options, row_weight=weight,
                target_norm=norm, backend=backend,
            )  # fmt: skip
            assert same_bits(got, again.detach())
            if not again.numel():
                continue
            grads = torch.autograd.grad(again.sum(), [each for each in leaves if each is not None])
            repeated = torch.autograd.grad(
                cosine_mse_loss(
                    leaves[0], target if norm is not None else leaves[1], **options, row_weight=weight,
                    target_norm=norm, backend=backend,
                ).sum(),
                [each for each in leaves if each is not None],
            )  # fmt: skip
            assert same_bits(grads, repeated)
        for name, each, want, own, leaf, other, of in zip(
            ("output", "target"),
            grads,
            exact,
            (y_norm, x_norm),
            (y, x),
            (x, y),
            (output, target),
            strict=False,
        ):
            from_root = torch.where(root == 0, 0.0, rmse_weight / H / root) * factor
            magnitude = (2 * mse_weight / H * factor + from_root).unsqueeze(1) * e.abs()
            if power_weight:
                slope = (e.abs() + reference.POWER_BIAS).pow(case["alpha"] - 1)
                magnitude = magnitude + (factor * power_weight * case["alpha"] / H).unsqueeze(1) * slope
            if cosine_weight:
                along = torch.where(own > 0, 1 / own.square(), 0.0)
                across = torch.where(product < case["eps"], 1 / case["eps"], 1 / product)
                slopes = along.unsqueeze(1) * leaf.abs() + across.unsqueeze(1) * other.abs()
                magnitude = magnitude + (factor * cosine_weight).unsqueeze(1) * slopes
            bound = out_unit * want.abs() + terms * unit * magnitude + flush * 64 * (1 + 1 / case["eps"])
            if of.dtype != dtype:
                bound = bound + torch.finfo(of.dtype).eps * want.abs() + torch.finfo(of.dtype).smallest_normal
            limit = torch.finfo(of.dtype).max / torch.finfo(each.dtype).max
            assert_within(
                each.reshape(want.shape),
                torch.where(ordinary.unsqueeze(1), want, math.inf),
                bound,
                (magnitude * 16 + 1e-300) / limit,
                f"{backend} gradient of {name}",
                broken.unsqueeze(1),
            )


LOSS_NAMES = ("output", "target", "row_weight", "target_norm")
HOSTILE_OPTIONS = (
    {}, {}, {}, dict(alpha=0.0), dict(alpha=math.nan), dict(alpha=-1.0), dict(eps=0.0), dict(eps=math.nan),
    dict(eps=-1.0), dict(eps=math.inf), dict(reduction="median"), dict(cosine_weight=math.nan),
    dict(mse_weight=math.inf), dict(rmse_weight=-1.0), dict(alpha=1e300),
)  # fmt: skip


def cosine_mse_refused_case(random: Random) -> Case:
    case = cosine_mse_case(random)
    case["values"] = dict.fromkeys(case["values"], "normal")
    case["spoiling"] = [spoiling(random, LOSS_NAMES) for _ in range(random.choice((1, 1, 2)))]
    case["options"] = random.choice(HOSTILE_OPTIONS)
    case["grad"] = random.random() < 0.5
    return case


@fuzz(cosine_mse_refused_case)
def test_cosine_mse_loss_refuses_alike(case):
    output, target, weight, norm = compared(case)
    arguments = spoil(dict(output=output, target=target, row_weight=weight, target_norm=norm), case)
    if arguments["output"] is None or arguments["target"] is None:
        return
    if case["grad"]:
        arguments["output"] = arguments["output"].detach()
        if arguments["output"].is_floating_point():
            arguments["output"].requires_grad_()
    options = {**loss_options(case), **case["options"]}

    def call(backend: str) -> Any:
        loss = cosine_mse_loss(**arguments, **options, backend=backend)
        if loss.requires_grad and not loss.is_meta:
            loss.sum().backward()
        return loss.detach()

    names = (*LOSS_NAMES, *options, "cosine_mse")
    results = refused_alike({backend: lambda backend=backend: call(backend) for backend in BACKENDS}, names)
    native, plain = results.values()
    if isinstance(native, Tensor):
        assert (native.shape, native.dtype) == (plain.shape, plain.dtype)


# ---- autoencoder_loss --------------------------------------------------------------------------------

AUTOENCODER_NAMES = ("codes", "encoder_weight", "encoder_bias", "basis", "offset")


def autoencoder_case(random: Random) -> Case:
    case = loss_case(random)
    case["reduction"] = random.choice(("mean", "sum"))
    case["alpha"] = random.choice((1.0, 2.0))
    return dict(
        **case,
        N=random.choice((0, 1, 7, 40, random.randint(1, 60), 300)),
        r=random.choice((0, 1, 5, 12, random.randint(1, 24))),
        H=random.choice((1, 16, 33, random.randint(1, 80))),
        dtype=random.choice(("float32", "float32", "float64")),
        encoder=random.choice((True, False)),
        bias=random.random() < 0.5,
        offset=random.random() < 0.5,
        norm=often(random, 1.0, 1e-12, 1e-5, 1e5, 1e15, 1e18),
        layouts=layouts_case(random, "target", *AUTOENCODER_NAMES),
        nan=random.random() < 0.1,
    )


def autoencoding(case: Case) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    generator, dtype = generator_of(case["seed"]), dtype_of(case["dtype"])
    N, r, H = case["N"], case["r"], case["H"]
    norm = case["norm"]
    shapes = dict(
        codes=((N, r), norm), encoder_weight=((r, H), H**-0.5), encoder_bias=((r,), norm),
        basis=((r, H), max(r, 1) ** -0.5), offset=((H,), norm),
    )  # fmt: skip
    parameters: dict[str, Tensor | None] = {}
    for name, (shape, size) in shapes.items():
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64) * size
        parameters[name] = laid_out(tensor.to(dtype), case["layouts"][name])
    if case["encoder"]:
        parameters["codes"] = None
        if not case["bias"]:
            parameters["encoder_bias"] = None
    else:
        parameters["encoder_weight"] = parameters["encoder_bias"] = None
    if not case["offset"]:
        parameters["offset"] = None
    target = (torch.randn(N, H, generator=generator, dtype=torch.float64) * norm).to(dtype)
    if case["nan"] and N:
        target[N // 2, 0] = math.nan
    rest: dict[str, Tensor | None] = dict(
        target=laid_out(target, case["layouts"]["target"]), row_weight=None, target_norm=None
    )
    if case["row_weight"]:
        rest["row_weight"] = torch.rand(N, generator=generator)
    if case["target_norm"]:
        rest["target_norm"] = rest["target"].double().norm(dim=1).to(dtype)
    return parameters, rest


def gradient_scales(case: Case, given: dict[str, Tensor], rest: dict[str, Tensor | None]) -> dict[str, float]:
    """What the gradients are sums of, in norm: a row's part of each is at most its own for y."""
    x, basis = rest["target"].double(), given["basis"].double()
    codes = given["codes"].double() if "codes" in given else x @ given["encoder_weight"].double().t()
    if "encoder_bias" in given:
        codes = codes + given["encoder_bias"].double()
    y = codes @ basis + (given["offset"].double() if "offset" in given else 0)
    cosine_weight, mse_weight, rmse_weight, power_weight = case["weights"]
    e, H = (y - x).abs(), case["H"]
    of_row = mse_weight * 2 / H * e.norm(dim=1) + rmse_weight / H**0.5
    of_row = of_row + power_weight * case["alpha"] / H * (e + 1e-10).pow(case["alpha"] - 1).norm(dim=1)
    of_row = of_row + cosine_weight / y.norm(dim=1).clamp_min(1e-300)
    if case["reduction"] == "mean" and len(x):
        of_row = of_row / len(x)
    width = float(torch.linalg.matrix_norm(basis)) if basis.numel() else 0.0
    of = dict(
        codes=of_row * width,
        encoder_weight=of_row * width * x.norm(dim=1),
        encoder_bias=of_row * width,
        basis=of_row * codes.norm(dim=1),
        offset=of_row,
    )
    return {name: float(each.sum()) * 4 for name, each in of.items()}


@fuzz(autoencoder_case)
def test_autoencoder_loss(case):
    parameters, rest = autoencoding(case)
    options = loss_options(case)
    given = {name: each for name, each in parameters.items() if each is not None}
    names = list(given)

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = {name: each.to(dtype).detach().requires_grad_() for name, each in given.items()}
        others = {name: None if each is None else each.to(dtype) for name, each in rest.items()}
        loss = function(**others, **leaves)
        return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)]

    def composed(target: Tensor, basis: Tensor, offset: Tensor | None = None, **encoder: Any) -> Tensor:
        rows = {name: encoder.pop(name) for name in ("row_weight", "target_norm")}
        codes = encoder.get("codes")
        if codes is None:
            codes = torch.nn.functional.linear(target, encoder["encoder_weight"], encoder.get("encoder_bias"))
        output = codes @ basis if offset is None else codes @ basis + offset
        return cosine_mse_loss(output, target, **rows, **options, backend="torch")

    dtype = dtype_of(case["dtype"])
    exact = run(composed, torch.float64)
    plain = run(composed, dtype)
    if not case["nan"] and case["N"]:
        assert all(bool(each.isfinite().all()) for each in exact)
    limit = torch.finfo(dtype)
    scales = {"loss": sum(case["weights"]), **gradient_scales(case, given, rest)}
    for backend in backends_of(case):
        with Unchanged(*parameters.values(), *rest.values()):
            function = functools.partial(autoencoder_loss, **options, backend=backend)
            ours, again = run(function, dtype), run(function, dtype)
        assert same_bits(ours, again)
        for name, got, native, want in zip(("loss", *names), ours, plain, exact, strict=True):
            assert got.shape == want.shape
            if case["nan"]:
                assert bool(got.isnan().any()) or not bool(want.isnan().any()), (
                    f"{backend} {name}: NaN was lost"
                )
                continue
            scale = want.abs().max() if want.numel() else torch.zeros(())
            if not want.numel() or not limit.smallest_normal * 1e6 < scale < limit.max / 1e6:
                continue
            # What is left of terms that cancel, as where rows have one direction, has their errors.
            tolerance = 2 * (native.double() - want).norm() + 1e3 * limit.eps * (want.norm() + scales[name])
            error = (got.double() - want).norm()
            assert error <= tolerance, (
                f"{backend} {name}: error {error:.3g}, expected at most {tolerance:.3g}"
            )


def autoencoder_refused_case(random: Random) -> Case:
    case = autoencoder_case(random)
    case["dtype"] = random.choice(("float32", "float64"))
    names = ("target", "row_weight", "target_norm", *AUTOENCODER_NAMES)
    case["spoiling"] = [spoiling(random, names) for _ in range(random.choice((1, 1, 2)))]
    case["options"] = random.choice(HOSTILE_OPTIONS)
    case["grad"] = random.random() < 0.5
    return case


@fuzz(autoencoder_refused_case)
def test_autoencoder_loss_refuses_alike(case):
    parameters, rest = autoencoding(case)
    arguments = spoil({**parameters, **rest}, case)
    if arguments["target"] is None or arguments["basis"] is None:
        return
    # Other dtypes have no native kernel, and bf16 and fp16 are the torch backend's alone.
    backends = BACKENDS if arguments["target"].dtype in (torch.float32, torch.float64) else ("torch",)
    options = {**loss_options(case), **case["options"]}
    if case["grad"]:
        for name in AUTOENCODER_NAMES:
            if arguments[name] is not None and arguments[name].is_floating_point():
                arguments[name] = arguments[name].detach().requires_grad_()

    def call(backend: str) -> Any:
        loss = autoencoder_loss(**arguments, **options, backend=backend)
        if loss.requires_grad and not loss.is_meta:
            loss.backward()
        return loss.detach()

    names = ("target", "row_weight", "target_norm", *AUTOENCODER_NAMES, *options, "autoencoder")
    results = refused_alike({backend: lambda backend=backend: call(backend) for backend in backends}, names)
    if len(results) == 2 and isinstance(results["native"], Tensor):
        assert results["native"].shape == results["torch"].shape


# ---- quantize_rows and quantize_trellis --------------------------------------------------------------


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
    """A layout that keeps the values."""
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
        arguments["levels"] = laid_out(trellis_levels(), layouts["levels"])
        scales = torch.rand(case["N"], case["tries"], generator=generator) + 0.5
        arguments["scales"] = laid_out(scales, case["layouts"]["scales"])
        return arguments
    arguments["levels"] = laid_out(scalar_levels(), layouts["levels"])
    arguments["steps"] = laid_out(uniform_steps(), layouts["steps"])
    factors = torch.rand(case["tries"], generator=generator) + 0.5
    arguments["factors"] = laid_out(factors, case["layouts"]["factors"])
    return arguments


def decoded(codes: Tensor, bits: list[int], trellis: bool) -> Tensor:
    parts = []
    for width, part in zip(bits, codes.long().split(32, 1), strict=True):
        if width == 0:
            parts.append(torch.zeros(part.shape, dtype=torch.float64))
        elif trellis:
            parts.append(trellis_levels()[width - 1].double()[trellis_states(part, width)] / 4096)
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
    # Beyond these the squares leave fp32's range: of such rows only their neighbours are checked.
    norm = x.norm(dim=1)
    usable = x.isfinite().all(1) & ((norm == 0) | ((norm > 1e-12) & (norm < 1e15)))
    for backend, (codes, scales, projections) in results.items():
        limits = torch.tensor(bits).repeat_interleave(32)
        assert bool((codes.long() < 1 << limits).all()), f"{backend}: a code has too many bits"
        d = decoded(codes, bits, trellis) * weight
        square, dot = d.square().sum(1), (x * d).sum(1)
        tolerance = 1e-5 * norm * d.norm(dim=1) + 1e-30
        assert bool((~usable | ((scales.double() * square - dot).abs() <= tolerance)).all()), (
            f"{backend} scales"
        )
        error = (projections.double() * square.sqrt() - dot).abs()
        assert bool((~usable | (error <= tolerance)).all()), f"{backend} projections"
    best = {backend: result[2].double() for backend, result in results.items()}
    # Two paths or levels may be as near as each other; a trellis's guess of its ends may then differ.
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

"""``gather_decode`` on random packed tables: errors within rounding, and equal refusals in every backend."""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor

from embkern.ops import gather_decode
from embkern.ops.packed_format import Tier, directory_of, packed_values, words_of_rows
from tests.fuzz import Case, fuzz, often
from tests.fuzz.ops import (
    BACKENDS,
    SCALES,
    backends_of,
    finite_sum,
    ids_case,
    ids_of,
    layouts_case,
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
    laid_out,
    make,
    outcome,
    rounding,
    same_bits,
    spoiling,
)

pytestmark = needs_extension


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
    """Return the tensors of a packed table with random records: every bit pattern is valid."""
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
        levels=torch.randint(-128, 128, (17, 16), generator=generator).to(torch.int8),
    )
    for name, tensor in tensors.items():
        layout = case["layouts"][name]  # these tensors must keep their values
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
    undefined = torch.full((len(flat), H), scale != 0)
    read = torch.full((len(flat), H), True)
    if basis is not None:
        coefficients = torch.nn.functional.pad(values, (0, max(0, case["K"] - values.shape[1])))
        coefficients = coefficients[:, : case["K"]]
        at = transform.unsqueeze(1)
        row = torch.where(at, coefficients @ basis.double(), row)
        size = torch.where(at, coefficients.abs() @ basis.double().abs(), size)
        # Groups without bits are no terms: their rows of the basis may be multiplied by 0, or not read.
        terms = (coefficients != 0).double()
        read = ~at | (terms @ (~basis.isfinite()).double() > 0)
        undefined &= read | b.isnan() | (~factor.isfinite() & (terms.sum(1, keepdim=True) > 0))
    exact = scale * (factor * row + b)
    sizes = factor.abs() * size + b.abs()
    # In bf16 and fp16 the scaled coefficients and the basis are rounded before the product.
    product = 2 * out_unit if dtype in (torch.bfloat16, torch.float16) else 0
    within = out_unit * exact.abs() + abs(scale) * (2 * (case["K"] + 6) * unit + product) * sizes
    # Multiplying in another order may overflow or flush where the exact sum does not.
    lost = flush * (4 + size + factor.abs()) * (1 + abs(scale)) * (1 + case["K"]) * 256
    most = torch.maximum(sizes, torch.maximum(size, factor.abs() * 128)) * max(1, abs(scale)) * 256
    lost = lost + flush * finite_sum(basis) * 256
    grad = make((*ids.shape, H), dtype, generator, case["values"]["grad"], case["layouts"]["grad"])
    g = grad.double().reshape(-1, H) * scale
    if padding is not None:
        g = g.masked_fill((flat == padding % case["V"]).unsqueeze(1), 0)
    # The gradient of the scales decodes rows as the lookup does.
    missed = (read & (row * g).isnan()).any(1).double()
    missed = torch.zeros(case["V"], dtype=torch.float64).index_add(0, flat, missed) > 0
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
            assert_within(got.reshape(exact.shape), exact, within + lost, most, f"{backend} rows", undefined)
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
                missed if name == "scales" else torch.ones_like(want, dtype=torch.bool),
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
        case = {**case, "width": 2**62}  # a valid 2**31 would allocate 8 GiB per row
    # The ops do not check tiers and records against each other; loading a table does.
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
            # torch words the error of a failed allocation.
            outcome(call, (*names, "API") if backend == "native" else ())
        return
    results = refused_alike(calls, names)
    native, plain = results.values()
    if isinstance(native, Tensor):
        assert (native.shape, native.dtype) == (plain.shape, plain.dtype)

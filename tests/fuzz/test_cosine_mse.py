"""``cosine_mse_loss`` on drawn arguments: errors within rounding, and the same refusals in every backend."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import torch
from torch import Tensor

from embkern.ops import cosine_mse_loss, reference
from tests.fuzz import Case, fuzz, often
from tests.fuzz.ops import (
    BACKENDS,
    HOSTILE_OPTIONS,
    backends_of,
    layouts_case,
    leaves_of,
    loss_case,
    loss_options,
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
    rounding,
    same_bits,
    spoiling,
)

pytestmark = needs_extension


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
    # The sums of the absolute values of the terms of the loss, to which its bound is proportional.
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
    # Rows near eps may take either branch, and squares of tiny rows underflow: neither is checked.
    ordinary = ((product < 0.99 * case["eps"]) | (product > 1.01 * case["eps"])) & (product.isfinite())
    accumulation = torch.finfo(reference.accumulation_dtype(dtype))
    if dtype != torch.float64:
        ordinary &= (product == 0) | (product > 1e-30)
    else:
        ordinary &= (product == 0) | (product > 1e-290)
    if not cosine_weight:
        ordinary = torch.ones_like(ordinary)
    # A row whose terms overflow makes the loss infinite or NaN, even with weight 0.
    ordinary &= (mse_weight * mse + power_weight * power.sum(1)) * 16 < accumulation.max
    relative = out_unit if dtype == torch.float64 else unit
    tiny = accumulation.smallest_normal * 16 * (1 + H)
    checked = ordinary if case["reduction"] == "none" else ordinary.all()
    shape = output.shape[:-1] if case["reduction"] == "none" else ()
    # A term of weight 0 is not computed, so NaN in the inputs need not reach the loss.
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

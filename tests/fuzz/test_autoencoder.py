"""``autoencoder_loss`` against the composed formula, and the same refusals in every backend."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from embkern.ops import autoencoder_loss, cosine_mse_loss
from tests.fuzz import Case, fuzz, often
from tests.fuzz.ops import (
    BACKENDS,
    HOSTILE_OPTIONS,
    backends_of,
    layouts_case,
    loss_case,
    loss_options,
    needs_extension,
    refused_alike,
    spoil,
)
from tests.fuzz.tensors import (
    Unchanged,
    dtype_of,
    generator_of,
    laid_out,
    same_bits,
    spoiling,
)

pytestmark = needs_extension

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
    """Bound the norm of each gradient's terms: sum over rows of the gradient of y times the other factor."""
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
            # Where terms cancel, as for rows with one common direction, the error is that of the terms.
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
    # The native kernel serves float32 and float64 only.
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

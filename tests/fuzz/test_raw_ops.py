"""The native overloads, called through the dispatcher with arguments that no public function passes.

They check their own arguments: a call is refused or computes something, and never reads or writes out of
bounds, which ``make fuzz`` checks under AddressSanitizer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from embkern.methods.row_codes import scalar_levels, uniform_steps
from embkern.ops.backends import unavailable
from embkern.ops.library import overload
from embkern.ops.packed_codes import packed_levels
from embkern.ops.packed_format import Tier, directory_of, words_of_rows
from tests.fuzz import Case, fuzz
from tests.fuzz.tensors import dtype_of, generator_of, outcome, spoiled, spoiling

pytestmark = pytest.mark.skipif(
    unavailable("native", "gather_project", "cpu", torch.float32) is not None,
    reason="the extension is not built",
)
INTEGERS = (0, 1, -1, 2, 3, 7, 100, 2**31 - 1, -(2**31), 2**40, 2**62, 2**63 - 1, -(2**63))
NUMBERS = (0.0, 1.0, -1.0, 1e-300, 1e300, math.nan, math.inf, -math.inf)


def _project(random: Random, g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    V, r, H = random.randint(1, 20), random.randint(1, 20), random.randint(1, 70)
    ids = torch.randint(V, (random.randint(1, 40),), generator=g)
    rows = torch.randn(V, r, generator=g).to(dtype), torch.randn(r, H, generator=g).to(dtype)
    return dict(ids=ids, codes=rows[0], basis=rows[1])


def gather_project_forward(random: Random, g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    given = _project(random, g, dtype)
    return dict(**given, offset=torch.randn(given["basis"].shape[1], generator=g).to(dtype), scale=1.0)


def gather_project_out(random: Random, g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    given = gather_project_forward(random, g, dtype)
    return dict(**given, out=torch.zeros(len(given["ids"]), given["basis"].shape[1], dtype=dtype))


def gather_project_backward(random: Random, g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    given = _project(random, g, dtype)
    grad = torch.randn(len(given["ids"]), given["basis"].shape[1], generator=g).to(dtype)
    flags = {name: random.random() < 0.7 for name in ("needs_codes", "needs_basis", "needs_offset", "sparse")}
    return dict(grad=grad, **given, scale=1.0, padding_idx=random.choice((-1, 0)), **flags)


def gather_decode_forward(random: Random, g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    V, H, K = random.randint(1, 70), random.randint(1, 70), random.choice((0, 32, 64))
    tiers = [Tier(False, (random.randint(0, 8),) * (-(-H // 32))) for _ in range(random.randint(1, 8))]
    if K:
        tiers.append(Tier(True, (random.randint(1, 8),) * (K // 32)))
    groups = max(len(tier.bits) for tier in tiers)
    tier_of = torch.randint(len(tiers), (V,), generator=g)
    described = [[int(t.transform), *t.bits, *[0] * (groups - len(t.bits))] for t in tiers]
    words = max(1, int(words_of_rows(tier_of, tiers).sum()))
    return dict(
        ids=torch.randint(V, (random.randint(1, 40),), generator=g),
        records=torch.randint(-(2**31), 2**31, (words,), generator=g).to(torch.int32),
        directory=directory_of(tier_of, tiers),
        tiers=torch.tensor(described, dtype=torch.uint8),
        levels=packed_levels(),
        scales=torch.rand(V, generator=g).to(dtype),
        basis=torch.randn(K, H, generator=g).to(dtype) if K else None,
        offset=torch.randn(H, generator=g).to(dtype),
        embedding_dim=H,
        scale=1.0,
    )


def packed_cross_entropy_forward(random: Random, g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    given = gather_decode_forward(random, g, dtype)
    states, V, H = random.choice((1, 20, 300)), len(given["scales"]), given["embedding_dim"]
    del given["ids"], given["embedding_dim"], given["scale"]
    smoothing = random.choice((0.0, 0.1))
    return dict(
        hidden=torch.randn(states, H, generator=g).to(random.choice((dtype, torch.float32))),
        labels=torch.randint(V, (states,), generator=g),
        **given,
        bias=torch.randn(V, generator=g) if random.random() < 0.5 else None,
        ignore_index=random.choice((-100, 0)),
        label_smoothing=smoothing,
        softcap=random.choice((0.0, 5.0)),
        needs_hidden=smoothing == 0 and random.random() < 0.5,
    )


def packed_cross_entropy_backward(random: Random, g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    given = packed_cross_entropy_forward(random, g, dtype)
    states, dtypes = len(given["labels"]), (given["hidden"].dtype, given["scales"].dtype)
    del given["needs_hidden"]
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    names = ("needs_hidden", "needs_scales", "needs_basis", "needs_offset", "needs_bias")
    return dict(
        grad=torch.randn(states, generator=g),
        statistics=torch.randn(states, 3, generator=g).to(wide),
        **given,
        **{name: random.random() < 0.7 for name in names},
    )


def _to_quantize(random: Random, g: torch.Generator, most: int) -> dict[str, Any]:
    groups = random.randint(1, 3)
    return dict(
        values=torch.randn(random.randint(1, 5), 32 * groups, generator=g),
        spread=torch.rand(32 * groups, generator=g) + 0.1,
        bits=torch.randint(most + 1, (groups,), generator=g).to(torch.uint8),
    )


def quantize_rows(random: Random, g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    return dict(
        **_to_quantize(random, g, 8),
        levels=scalar_levels().clone(),
        steps=uniform_steps().clone(),
        factors=torch.rand(random.randint(1, 3), generator=g) + 0.5,
        needs_codes=random.random() < 0.7,
    )


def quantize_trellis(random: Random, g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    given = _to_quantize(random, g, 4)
    scales = torch.rand(len(given["values"]), random.randint(1, 3), generator=g) + 0.5
    return dict(**given, levels=packed_levels().clone(), scales=scales, needs_codes=random.random() < 0.7)


def _loss_options(random: Random) -> dict[str, Any]:
    weights = [random.choice((0.0, 0.5)) for _ in range(4)]
    names = ("cosine_weight", "mse_weight", "rmse_weight", "power_weight")
    return dict(zip(names, weights, strict=True), alpha=random.choice((1.0, 0.1)), eps=1e-8)


def cosine_mse_forward(random: Random, g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    shape, reduction = (random.randint(1, 20), random.randint(1, 70)), random.randrange(3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return dict(
        output=torch.randn(shape, generator=g).to(dtype),
        target=torch.randn(shape, generator=g).to(dtype),
        row_weight=torch.rand(shape[0], generator=g).to(wide) if random.random() < 0.5 else None,
        target_norm=torch.rand(shape[0], generator=g).to(wide) if random.random() < 0.5 else None,
        grad_loss=torch.ones(shape[0] if reduction == 0 else (), dtype=wide)
        if random.random() < 0.5
        else None,
        reduction=reduction,
        **_loss_options(random),
        needs_output=random.random() < 0.7,
        needs_target=random.random() < 0.7,
    )


def autoencoder_forward(random: Random, g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    N, r, H = random.choice((1, 7, 40, 300)), random.randint(1, 20), random.randint(1, 70)
    encoder = random.random() < 0.5
    draw = lambda *shape: torch.randn(shape, generator=g).to(dtype)  # noqa: E731
    return dict(
        target=draw(N, H),
        codes=None if encoder else draw(N, r),
        encoder_weight=draw(r, H) if encoder else None,
        encoder_bias=draw(r) if encoder else None,
        basis=draw(r, H),
        offset=draw(H),
        row_weight=draw(N).abs() if random.random() < 0.5 else None,
        target_norm=draw(N).abs() if random.random() < 0.5 else None,
        reduction=random.choice((1, 2)),
        **_loss_options(random),
        needs_grad=random.random() < 0.7,
    )


def autoencoder_train(random: Random, g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    V, r, H = random.randint(1, 40), random.randint(1, 12), random.randint(1, 40)
    size = 2 * r * H + r + H
    return dict(
        rows=torch.randn(V, H, generator=g).to(dtype),
        order=torch.randint(V, (random.randint(1, 60),), generator=g),
        batch_size=random.choice((1, 4, 32)),
        parameters=torch.randn(size, generator=g).to(dtype),
        first_moment=torch.zeros(size, dtype=dtype),
        second_moment=torch.zeros(size, dtype=dtype),
        rank=r,
        step=0,
        lr=1e-3,
        beta1=0.9,
        beta2=0.999,
        adam_eps=1e-8,
        **_loss_options(random),
    )


OPS: dict[str, Callable[..., dict[str, Any]]] = {
    each.__name__: each
    for each in (
        gather_project_forward,
        gather_project_out,
        gather_project_backward,
        gather_decode_forward,
        packed_cross_entropy_forward,
        packed_cross_entropy_backward,
        quantize_rows,
        quantize_trellis,
        cosine_mse_forward,
        autoencoder_forward,
        autoencoder_train,
    )
}


def raw_case(random: Random) -> Case:
    op, shapes = random.choice(list(OPS)), random.randrange(1 << 32)
    dtype = random.choice(("float32", "bfloat16", "float16", "float64"))
    given = OPS[op](Random(shapes), generator_of(0), dtype_of(dtype))
    return dict(
        op=op,
        seed=shapes,
        dtype=dtype,
        spoiling=[spoiling(random, given) for _ in range(random.choice((1, 1, 2, 3)))],
        integer=random.choice(INTEGERS),
        number=random.choice(NUMBERS),
    )


def spoil(value: Any, how: dict[str, Any], case: Case) -> Any:
    if value is None or isinstance(value, Tensor):
        return spoiled(value, how)
    if isinstance(value, bool):
        return not value
    return case["integer"] if isinstance(value, int) else case["number"]


@fuzz(raw_case)
def test_raw_ops_refuse_or_compute(case):
    given = OPS[case["op"]](Random(case["seed"]), generator_of(case["seed"]), dtype_of(case["dtype"]))
    for how in case["spoiling"]:
        given[how["name"]] = spoil(given[how["name"]], how, case)
    width = given.get("embedding_dim", 0)
    if 2**20 < width < 2**40:  # it may be valid, and would allocate gigabytes
        given["embedding_dim"] = 2**40
    call = lambda: overload(case["op"], "native")(*given.values())  # noqa: E731
    if any(isinstance(each, Tensor) and each.is_meta for each in given.values()):
        with contextlib.suppress(Exception):  # the shape function alone does not check its arguments
            call()
    else:
        outcome(call)


def trained_case(random: Random) -> Case:
    return dict(seed=random.randrange(1 << 32), dtype=random.choice(("float32", "float64")))


@fuzz(trained_case)
def test_training_steps_follow_their_gradients(case):
    """One step of the native trainer is a step of Adam on the gradients of ``autoencoder_forward``."""
    dtype = dtype_of(case["dtype"])
    given = autoencoder_train(Random(case["seed"]), generator_of(case["seed"]), dtype)
    given["order"] = given["order"][: given["batch_size"]]
    before, (r, H) = given["parameters"].clone(), (given["rank"], given["rows"].shape[1])
    again = {name: each.clone() if isinstance(each, Tensor) else each for name, each in given.items()}
    losses = overload("autoencoder_train", "native")(*given.values())
    assert torch.equal(losses, overload("autoencoder_train", "native")(*again.values()))
    assert torch.equal(given["parameters"], again["parameters"])
    rows = given["rows"][given["order"]]
    parts = before.split((r * H, r, r * H, H))
    parameters = (None, parts[0].view(r, H), parts[1], parts[2].view(r, H), parts[3])
    weights = [given[name] for name in ("cosine_weight", "mse_weight", "rmse_weight", "power_weight")]
    terms, _, *grads = overload("autoencoder_forward", "native")(
        rows, *parameters, None, None, 1, *weights, given["alpha"], given["eps"], True
    )
    unit = torch.finfo(dtype).eps
    assert abs(float(losses[0] - terms[0])) <= 100 * unit * (1 + abs(float(terms[0])))
    grad = torch.cat([each.reshape(-1) for each in grads])
    # After one step Adam's moments are (1 - beta1) * grad and (1 - beta2) * grad ** 2.
    norm = float(grad.norm()) + 1e-30
    assert float((given["first_moment"] - 0.1 * grad).norm()) <= 1e3 * unit * norm
    assert float((given["second_moment"] - 0.001 * grad.square()).norm()) <= 1e3 * unit * norm**2
    moved = (before - given["parameters"]).abs().max()
    assert float(moved) <= 1e-3 * (1 + 100 * unit) + unit * float(before.abs().max())

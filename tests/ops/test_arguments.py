"""Every public op: all backends treat layouts, dtypes, shapes, devices and empty tensors alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

pytest.importorskip("pydantic", reason="the methods need pydantic")

from embkern.methods.row_codes import scalar_levels, uniform_steps
from embkern.ops import autoencoder_loss, cosine_mse_loss, gather_decode, gather_project
from embkern.ops.backends import BACKENDS, unavailable
from embkern.ops.packed_codes import packed_levels
from embkern.ops.quantize_rows import quantize_rows
from embkern.ops.quantize_trellis import quantize_trellis


class Case(NamedTuple):
    """An op, a name of ``backends.KERNELS``, and arguments that it takes."""

    function: Callable
    op: str
    arguments: dict[str, Any]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape)


def project() -> Case:
    ids = torch.tensor([3, 0, 3, 6, 1])
    given = dict(ids=ids, codes=draw(7, 4), basis=draw(4, 6), offset=draw(6), scale=1.5)
    return Case(gather_project, "gather_project", given)


def decode() -> Case:
    """Rows of 3 bits, and rows of coefficients of 2 bits, in turn."""
    lanes = torch.arange(32)
    planes = torch.randint(-(2**31), 2**31, (16 * 3 + 16 * 2,)).to(torch.int32)
    words = [int((lanes[first : first + 8] % 2 << 4 * torch.arange(8)).sum()) for first in range(0, 32, 8)]
    given = dict(
        ids=torch.tensor([3, 0, 3, 6, 1]),
        records=planes,
        directory=torch.tensor([[0, *words]], dtype=torch.int32),
        tiers=torch.tensor([[0, 3], [1, 2]], dtype=torch.uint8),
        levels=torch.randint(-40, 40, (17, 16)).to(torch.int8),
        scales=torch.rand(32) + 0.5,
        basis=draw(32, 20),
        offset=draw(20),
        embedding_dim=20,
    )
    return Case(gather_decode, "gather_decode", given)


def cosine_mse() -> Case:
    target = draw(5, 6)
    given = dict(output=draw(5, 6), target=target, row_weight=torch.rand(5) + 0.1, rmse_weight=0.3)
    return Case(cosine_mse_loss, "cosine_mse", given | dict(target_norm=target.norm(dim=1)))


def encoder() -> Case:
    given = dict(target=draw(5, 6), basis=draw(3, 6), offset=draw(6), encoder_weight=draw(3, 6))
    more = dict(encoder_bias=draw(3), row_weight=torch.rand(5) + 0.1, power_weight=0.1)
    return Case(autoencoder_loss, "autoencoder", given | more)


def decoder() -> Case:
    given = dict(
        target=draw(300, 6), basis=draw(3, 6), offset=draw(6), codes=draw(300, 3)
    )  # This shape takes the Gram form.
    return Case(autoencoder_loss, "autoencoder", given)


def scalar_codes() -> Case:
    given = dict(
        values=draw(5, 64), spread=torch.rand(64) + 0.1, bits=torch.tensor([3, 6], dtype=torch.uint8)
    )
    more = dict(levels=scalar_levels(), steps=uniform_steps(), factors=torch.tensor([0.9, 1.0, 1.1]))
    return Case(quantize_rows, "quantize_rows", given | more | dict(needs_codes=True))


def trellis_codes() -> Case:
    given = dict(
        values=draw(5, 64), spread=torch.rand(64) + 0.1, bits=torch.tensor([3, 2], dtype=torch.uint8)
    )
    more = dict(levels=packed_levels(), scales=torch.rand(5, 3) + 0.5, needs_codes=True)
    return Case(quantize_trellis, "quantize_trellis", given | more)


CASES = {
    each.__name__: each
    for each in (project, decode, cosine_mse, encoder, decoder, scalar_codes, trellis_codes)
}
TENSORS = [
    (name, each)
    for name, make in CASES.items()
    for each, value in make().arguments.items()
    if isinstance(value, Tensor)
]
# These arguments may have any dtype and are promoted.
PROMOTED = ("row_weight", "target_norm")
WITH_GRADIENTS = ("codes", "basis", "offset", "scales", "output", "encoder_weight", "encoder_bias")


def backends(op: str) -> list[str]:
    return [each for each in BACKENDS if unavailable(each, op, "cpu", torch.float32) is None]


def outcome(case: Case, backend: str, **change: Any) -> Any:
    """Results and gradients, or the type and the message of the error."""
    arguments = case.arguments | change
    leaves = {}
    if case.op not in ("quantize_rows", "quantize_trellis"):
        for name in WITH_GRADIENTS:
            value = arguments.get(name)
            if isinstance(value, Tensor) and value.is_floating_point():
                leaves[name] = arguments[name] = value.detach().requires_grad_()
    try:
        result = case.function(**arguments, backend=backend)
    except Exception as error:
        chained = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        assert chained is None, "a wrong argument has one traceback"
        return type(error).__name__, str(error)
    if not leaves:
        return result
    return [result.detach(), *torch.autograd.grad(result.sum(), list(leaves.values()))]


def assert_all_agree(case: Case, **change: Any) -> Any:
    outcomes = {each: outcome(case, each, **change) for each in backends(case.op)}
    first, *others = outcomes.values()
    for other in others:
        if isinstance(first[0], str) or isinstance(other[0], str):
            assert other == first, outcomes
        else:
            assert_close(list(other), list(first), rtol=1e-4, atol=1e-5, equal_nan=True)
    return first


def strided(tensor: Tensor) -> Tensor:
    return torch.stack((tensor, tensor), -1)[..., 0] if tensor.dim() else tensor


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("poisoned")
def test_what_is_right_has_one_result(name):
    assert isinstance(assert_all_agree(CASES[name]())[0], Tensor)


@pytest.mark.parametrize(("name", "argument"), TENSORS)
@pytest.mark.usefixtures("poisoned")
def test_the_layout_changes_nothing(name, argument):
    case = CASES[name]()
    given = case.arguments[argument]
    other = strided(given)
    assert not other.is_contiguous()
    for backend in backends(case.op):
        expected = outcome(case, backend)
        for got, each in zip(outcome(case, backend, **{argument: other}), expected, strict=True):
            assert_close(got, each, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "argument"), [each for each in TENSORS if each[1] not in PROMOTED])
@pytest.mark.parametrize("empty", [False, True], ids=["", "no rows"])
def test_a_wrong_dtype_is_a_type_error_that_names_the_argument(name, argument, empty):
    case = CASES[name]()
    nothing = {each: case.arguments[each][:0] for each in ("ids", "output") if each in case.arguments}
    if empty and "ids" not in nothing:
        pytest.skip("no ids")
    change = {"ids": nothing["ids"]} if empty else {}
    given = change.get(argument, case.arguments[argument])
    dtypes = (torch.int16, torch.float64) if given.dtype in (torch.int64, torch.int32) else (torch.int32,)
    if given.dtype == torch.int8:  # levels of int16 and int32 are those of the first edition
        dtypes = (torch.int64, torch.float32)
    if given.dtype == torch.float32 and argument not in ("output", "target", "codes", "scales", "values"):
        dtypes += (torch.float64, torch.float16)
    for dtype in dtypes:
        kind, message = assert_all_agree(case, **change | {argument: given.to(dtype)})
        assert kind == "TypeError", message
        # The first floating-point tensor determines the dtype of the others, or the op has no kernel for it.
        assert argument in message or "is not supported" in message or "expected dtype torch.int32" in message


@pytest.mark.parametrize(("name", "argument"), [each for each in TENSORS if each[1] != "ids"])
def test_a_wrong_shape_or_device_is_a_value_error_that_names_an_argument(name, argument):
    case = CASES[name]()
    given = case.arguments[argument]
    changes = [given.unsqueeze(0)]
    if (name, argument) not in (
        ("project", "codes"),
        ("decode", "scales"),
    ):  # whose device chooses the kernel
        changes.append(given.to("meta"))
    if argument not in ("records", "factors", "scales"):  # of any length
        changes.append(given[..., :-1])
    for changed in changes:
        kind, message = assert_all_agree(case, **{argument: changed})
        assert kind == "ValueError", message
        assert any(each in message for each in case.arguments), message


def sized(case: Case, **sizes: int) -> dict[str, Any]:
    """The arguments cut to the sizes of V, r, H and N that are given."""
    axes = {
        "ids": "N",
        "codes": "Nr" if case.op == "autoencoder" else "Vr",
        "basis": "rH",
        "offset": "H",
        "output": "NH",
        "target": "NH",
        "row_weight": "N",
        "target_norm": "N",
        "encoder_weight": "rH",
        "encoder_bias": "r",
        "values": "NH",
        "scales": "N",
    }
    changed = {}
    for name, value in case.arguments.items():
        if isinstance(value, Tensor) and name in axes:
            for dim, axis in enumerate(axes[name]):
                value = value.narrow(dim, 0, min(sizes.get(axis, 10**6), value.shape[dim]))
            changed[name] = value
    return changed


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *(("project", sizes) for sizes in (dict(N=0), dict(r=0), dict(H=0), dict(N=0, V=0), dict(r=0, H=0))),
        *(("project", sizes) for sizes in (dict(N=1, r=0), dict(N=1, H=0), dict(N=0, V=0, r=0, H=0))),
        *(("cosine_mse", sizes) for sizes in (dict(N=0), dict(H=0), dict(N=0, H=0))),
        *(("encoder", sizes) for sizes in (dict(N=0), dict(r=0), dict(H=0), dict(N=0, r=0))),
        *(("decoder", sizes) for sizes in (dict(N=0), dict(r=0), dict(H=0), dict(N=0, r=0))),
        *(("scalar_codes", sizes) for sizes in (dict(N=0), dict(H=0))),
        *(("trellis_codes", sizes) for sizes in (dict(N=0), dict(H=0))),
    ],
    ids=str,
)
@pytest.mark.usefixtures("poisoned")
def test_sizes_of_zero_mean_the_same_to_all(name, sizes):
    case = CASES[name]()
    reductions = ("mean", "sum") if "target" in case.arguments else (None,)
    for reduction in reductions:
        options = {} if reduction is None else {"reduction": reduction}
        got = assert_all_agree(case, **sized(case, **sizes), **options)
        refused = name not in ("project",) and sizes.get("H") == 0
        assert isinstance(got[0], str) == refused, got
    for given in ("offset", "encoder_bias", "row_weight", "target_norm", "spread"):
        if given in case.arguments:
            assert_all_agree(case, **sized(case, **sizes) | {given: None})


@pytest.mark.parametrize("change", ["ids", "records", "tiers", "scales", "levels", "no basis"])
@pytest.mark.usefixtures("poisoned")
def test_empty_tensors_of_a_packed_table_mean_the_same_to_all(change):
    case = decode()
    if change == "no basis":
        nothing = dict(basis=None, tiers=case.arguments["tiers"][:1], ids=case.arguments["ids"][:0])
        got = assert_all_agree(case, **nothing)
    else:
        got = assert_all_agree(case, **{change: case.arguments[change][:0]})
    assert isinstance(got[0], str) == (change not in ("ids", "no basis")), got


@pytest.mark.parametrize("sizes", [dict(N=0), dict(r=0), dict(H=0), dict(N=0, V=0), {}], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.usefixtures("poisoned")
def test_a_sparse_gradient_of_nothing_is_the_dense_one(sizes, padding_idx):
    """Ids of rows without a gradient have to be valid, too: they are read when the tensor is made dense."""
    case = project()
    given = case.arguments | sized(case, **sizes)
    for backend in backends("gather_project"):
        grads = []
        for sparse in (True, False):
            codes = given["codes"].detach().requires_grad_()
            chosen = dict(codes=codes, sparse=sparse, backend=backend)
            if len(codes):
                chosen["padding_idx"] = padding_idx
            gather_project(**given | chosen).sum().backward()
            if sparse:
                found = codes.grad._indices()
                assert ((found >= 0) & (found < len(codes))).all()
            grads.append(codes.grad.to_dense() if sparse else codes.grad)
        assert_close(*grads)


@pytest.mark.parametrize("name", ["scalar_codes", "trellis_codes"])
def test_quantisers_refuse_bits_out_of_range_and_gradients(name):
    case = CASES[name]()
    too_many = torch.tensor([3, 9], dtype=torch.uint8)
    assert "bits: expected up to" in assert_all_agree(case, bits=too_many)[1]
    wanted = case.arguments["values"].clone().requires_grad_()
    assert "without gradient" in assert_all_agree(case, values=wanted)[1]

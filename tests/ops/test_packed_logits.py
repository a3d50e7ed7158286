"""packed_logits: numbers against float64, gradients, bits, damaged tables, arguments, compilation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from embkern.ops import packed_logits, reference
from embkern.ops.library import cpu_capability
from embkern.ops.packed_format import Tier
from tests.conftest import assert_no_worse_over_draws, assert_no_worse_than, compile_counting
from tests.ops.packed_problems import Problem, problem

OP = "packed_logits"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (V, H, K): rows and coefficients of several groups; odd rows with groups that begin beyond them; rows within
# one group; no basis; more rows than are decoded at a time in the forward and in the backward.
SHAPES = [(301, 160, 128), (97, 97, 96), (200, 33, 32), (200, 70, 0), (1100, 40, 32)]
STATES = [1, 3, 8, 9, 50]  # on both sides of those that are few, and of the widths of the kernels


def results(function, hidden, factors, upstream, cast):
    leaves = [each.detach().to(cast, copy=True).requires_grad_() for each in (hidden, *factors)]
    out = function(*leaves)
    out.backward(upstream.to(cast))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def ours(p: Problem, **options):
    def function(hidden, *factors):
        given = iter(factors)
        rest = [each if each is None else next(given) for each in (p.scales, p.basis, p.offset)]
        return packed_logits(hidden, *p.codes, *rest, **options)

    return function


def plain(p: Problem):
    ids = torch.arange(len(p.scales), device=p.ids.device)
    return lambda hidden, *factors: F.linear(hidden, p.plain(ids, *factors))


def table(shape, dtype=torch.float32, device="cpu", **options) -> Problem:
    return problem((*shape, 1), dtype, device, **options)


def assert_contract(shape, states: int, dtype, device="cpu", **options):
    def draw():
        p = table(shape, dtype, device, offset=options.get("offset", True))
        hidden = torch.randn(states, p.H, device=device).to(dtype)
        upstream = torch.randn(states, len(p.scales), device=device).to(dtype)
        got = results(ours(p, backend=options.get("backend")), hidden, p.factors, upstream, dtype)
        assert got[0].dtype == dtype
        native = results(plain(p), hidden, p.factors, upstream, dtype)
        return got, native, results(plain(p), hidden, p.factors, upstream, torch.float64)

    assert_no_worse_over_draws(draw)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_every_instruction_set_keeps_the_numerical_contract(level, dtype):
    assert cpu_capability() == level
    for shape in SHAPES:
        for states in (1, 8, 50):
            assert_contract(shape, states, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_logits_and_gradients_are_no_worse_than_plain_torch(backend, device, shape, dtype):
    for states in STATES:
        assert_contract(shape, states, dtype, device, backend=backend)


@pytest.mark.parametrize("states", [3, 300])  # more than are multiplied at a time
def test_a_table_without_an_offset_and_many_hidden_states(backend, device, states):
    assert_contract((70, 33, 32), states, torch.float32, device, offset=False, backend=backend)


@pytest.mark.parametrize("table_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_hidden_states_may_be_of_another_dtype(backend, device, dtype, table_dtype):
    p = table((97, 97, 96), table_dtype, device)
    hidden = torch.randn(5, 97, device=device).to(dtype)
    got = ours(p, backend=backend)(hidden, *p.factors)
    assert got.dtype == dtype
    rows = plain(p)(torch.eye(97, dtype=torch.float64, device=device), *(f.double() for f in p.factors)).t()
    assert_no_worse_than(got, hidden @ rows.to(table_dtype).to(dtype).t(), hidden.double() @ rows.t())


@pytest.mark.parametrize("V", [1, 31, 33])
def test_tables_of_few_rows(backend, device, V):
    p = table((V, 40, 32), device=device)
    for states in (1, 20):
        hidden = torch.randn(states, 40, device=device)
        function, wide = plain(p), [each.double() for each in p.factors]
        exact, got = function(hidden.double(), *wide), ours(p, backend=backend)(hidden, *p.factors)
        # 40 products with sums of 32 each: no term passes more than 80 roundings, in either order.
        positive = p._replace(values=p.values.abs())
        sizes = plain(positive)(hidden.double().abs(), *(each.abs() for each in wide))
        assert bool(((got.double() - exact).abs() <= 80 * torch.finfo(torch.float32).eps * sizes).all())


def test_shapes_and_empty_batches(backend, device):
    p = table((40, 33, 32), device=device)
    f = ours(p, backend=backend)
    hidden = torch.randn(2, 3, 33, device=device)
    assert f(hidden, *p.factors).shape == (2, 3, 40)
    assert_close(f(hidden, *p.factors)[1, 2], f(hidden[1, 2], *p.factors))
    assert f(hidden[:0], *p.factors).shape == (0, 3, 40)
    apart = torch.randn(33, 5, device=device).t()
    assert_close(f(apart, *p.factors), f(apart.contiguous(), *p.factors))
    empty = hidden[:0].requires_grad_()
    f(empty, *p.factors).sum().backward()
    assert empty.grad.shape == empty.shape


def test_only_what_is_needed_has_a_gradient(backend, device):
    p = table((40, 33, 32), device=device)
    hidden, upstream = torch.randn(4, 33, device=device), torch.randn(4, 40, device=device)
    expected = results(plain(p), hidden, p.factors, upstream, torch.float32)[1:]
    for index in range(4):
        leaves = [hidden, *p.factors]
        leaves[index] = leaves[index].clone().requires_grad_()
        ours(p, backend=backend)(*leaves).backward(upstream)
        assert_close(
            leaves[index].grad, expected[index], rtol=1e-5, atol=1e-5 * float(expected[index].abs().max())
        )
        leaves[index].requires_grad_(False)


def test_the_gradients_of_the_definition(native):
    p = table((40, 5, 32), torch.float64, tiers=[Tier(False, (3,)), Tier(True, (4,))])
    leaves = [each.requires_grad_() for each in (torch.randn(3, 5).double(), *p.factors)]
    for backend in ("torch", native):
        assert torch.autograd.gradcheck(ours(p, backend=backend), leaves)


@pytest.mark.parametrize("states", [1, 8, 20, 300])
def test_the_bits_do_not_depend_on_threads(native, states):
    p = table((1100, 160, 128))
    hidden, upstream = torch.randn(states, 160), torch.randn(states, 1100)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(ours(p, backend=native), hidden, p.factors, upstream, torch.float32))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_damaged_directory_is_refused_and_never_followed(native):
    p = table((100, 33, 32))
    records, directory, tiers, levels = p.codes
    rest = (tiers, levels, p.scales, p.basis, p.offset)
    for place, value in (((1, 0), len(records)), ((0, 0), -1), ((2, 0), 2**31 - 1), ((0, 1), -1)):
        damaged = directory.clone()
        damaged[place] = value
        for states in (1, 20):
            hidden = torch.randn(states, 33, requires_grad=True)
            with pytest.raises(ValueError, match="directory: expected records within"):
                packed_logits(hidden.detach(), records, damaged, *rest, backend=native)
            logits = packed_logits(hidden, records, directory.clone(), *rest, backend=native)
            with pytest.raises(ValueError, match="directory: expected records within"):
                torch.ops.embkern.packed_logits_backward.native(
                    torch.ones_like(logits), hidden.detach(), records, damaged, *rest, True, True, True, True
                )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(hidden=torch.ones(3, 32)), ValueError, "basis: expected"),
        (dict(hidden=torch.ones(3, 33).long()), TypeError, "hidden: expected a floating-point dtype"),
        (dict(hidden=torch.ones(())), ValueError, r"hidden: expected shape \(\*, H\)"),
        (dict(scales=torch.ones(0)), ValueError, "scales: expected"),
        (dict(offset=torch.ones(33).double()), TypeError, "offset: expected dtype"),
        (dict(tiers=torch.ones(17, 2, dtype=torch.uint8)), ValueError, "tiers: expected"),
        (dict(levels=torch.zeros(17, 16)), TypeError, "levels: expected dtype"),
        (dict(hidden=torch.ones(3, 33, device="meta")), ValueError, "hidden: expected device cpu"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(backend, device, change, error, message):
    p = table((40, 33, 32), device=device)
    names = ("records", "directory", "tiers", "levels", "scales", "basis", "offset")
    arguments = {
        "hidden": torch.ones(3, 33),
        **dict(zip(names, (*p.codes, *p.factors), strict=True)),
        **change,
    }
    arguments = {name: each if each.is_meta else each.to(device) for name, each in arguments.items()}
    with pytest.raises(error, match=message) as caught:
        packed_logits(**arguments, backend=backend)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("op", ["packed_logits_forward", "packed_logits_backward"])
def test_opcheck(native, op):
    p = table((40, 33, 32))
    hidden, packed = torch.randn(3, 33), (*p.codes, *p.factors)
    arguments = (
        (hidden, *packed)
        if op.endswith("forward")
        else (torch.randn(3, 40), hidden, *packed, True, False, True, True)
    )
    torch.library.opcheck(getattr(torch.ops.embkern, op).native, arguments)


def test_it_compiles_to_one_node(native):
    p = table((40, 33, 32))
    compiled, graphs = compile_counting(lambda hidden: packed_logits(hidden, *p.codes, *p.factors))
    for states in (6, 7, 20):  # no other tensor has a size of 6, which would be taken for the same
        hidden = torch.randn(states, 33, requires_grad=True)
        got, expected = compiled(hidden), packed_logits(hidden, *p.codes, *p.factors)
        assert_close(got, expected)
        assert_close(torch.autograd.grad(got.sum(), hidden), torch.autograd.grad(expected.sum(), hidden))
    assert len(graphs) == 2
    calls = [node for node in graphs[0].graph.nodes if "packed_logits" in str(node.target)]
    assert len(calls) == 1


def test_the_definition_never_holds_the_table(monkeypatch):
    monkeypatch.setattr("embkern.ops.reference.packed_logits.PIECE_ROWS", 32)
    p, held = table((97, 33, 32)), []

    def watched(ids, *arguments):
        held.append(len(ids))
        return reference.gather_decode_forward(ids, *arguments)

    hidden, upstream = torch.randn(3, 33), torch.randn(3, 97)
    got = reference.packed_logits_forward(hidden, *p.codes, *p.factors, decode=watched)
    assert_close(got, plain(p)(hidden, *p.factors))
    grads = reference.packed_logits_backward(
        upstream, hidden, *p.codes, *p.factors, True, True, True, True, decode=watched
    )
    expected = results(plain(p), hidden, p.factors, upstream, torch.float32)[1:]
    for each, wanted in zip(grads, expected, strict=True):
        assert_close(each, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert set(held) == {32, 1}


def test_a_second_derivative_and_forward_mode_are_refused(backend, device):
    p = table((40, 33, 32), device=device)
    hidden = torch.randn(2, 33, device=device, requires_grad=True)
    logits = ours(p, backend=backend)(hidden, *p.factors)
    (grad,) = torch.autograd.grad(logits.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(grad.sum(), hidden)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(hidden.detach(), torch.ones_like(hidden))
        with pytest.raises((RuntimeError, NotImplementedError), match="jvp|forward"):
            ours(p, backend=backend)(dual, *p.factors)


def test_every_width_of_code_is_exact(native):
    for bits in range(1, 9):
        p = table((80, 45, 32), offset=False, tiers=[Tier(False, (bits, bits)), Tier(True, (bits,))])
        rows = packed_logits(torch.eye(45), *p.codes, *p.factors)  # a row of logits per column of the table
        exact = plain(p)(torch.eye(45).double(), *(f.double() for f in p.factors))
        assert_no_worse_than(rows, exact.float(), exact)

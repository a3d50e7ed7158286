"""gather_decode: numbers against float64, gradients."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from embkern.ops import reference
from embkern.ops.library import cpu_capability
from embkern.ops.packed_format import Tier
from embkern.tables.packed import pack
from tests.conftest import assert_no_worse_than
from tests.ops.conftest import assert_rounded_once
from tests.ops.packed_problems import problem, small

OP = "gather_decode"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (V, H, K, N): rows of a base model and of a small one, with each number of groups in the basis; odd rows
# with groups that begin beyond them; rows within one group; one token; a table without a basis.
SHAPES = [(301, 768, 128, 97), (301, 384, 192, 149), (97, 97, 96, 150), (40, 33, 32, 1), (40, 7, 0, 8)]


def with_gradients(function, ids, factors, upstream, cast):
    leaves = [f.detach().to(cast, copy=True).requires_grad_() for f in factors]
    out = function(ids, *leaves)
    out.backward(upstream.to(cast))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_contract(p, dtype, **options):
    upstream = torch.randn(*p.ids.shape, p.H, device=p.ids.device).to(dtype)
    ours = with_gradients(lambda ids, *f: p.ours(ids, *f, **options), p.ids, p.factors, upstream, dtype)
    assert ours[0].dtype == dtype
    native = with_gradients(p.plain, p.ids, p.factors, upstream, dtype)
    exact = with_gradients(p.plain, p.ids, p.factors, upstream, torch.float64)
    for got, theirs, true in zip(ours, native, exact, strict=True):
        assert_no_worse_than(got, theirs, true)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_every_instruction_set_keeps_the_numerical_contract(level, dtype):
    assert cpu_capability() == level
    for shape in [
        *SHAPES,
        (500, 35, 32, 700),
    ]:  # The last shape has more rows of a tier than a block of the product.
        assert_contract(problem(shape, dtype), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_forward_and_gradients_are_no_worse_than_plain_torch(backend, device, shape, dtype):
    assert_contract(problem(shape, dtype, device), dtype, backend=backend)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.usefixtures("poisoned")
def test_every_code_of_every_width_is_exact(backend, device, bits):
    H = 45
    tiers = [Tier(False, (bits, bits)), Tier(True, (bits,))]
    p = problem((80, H, 32, 1), device=device, offset=False, tiers=tiers)
    ids, identity = torch.arange(80, device=device), torch.eye(32, H, device=device)
    rows = p.ours(ids, torch.ones(80, device=device), identity, backend=backend)
    width = torch.where(p.transform, 32, H).unsqueeze(1)
    expected = p.values[:, :H].masked_fill(torch.arange(H, device=device) >= width, 0)
    assert torch.equal(rows.double(), expected)


@pytest.mark.parametrize("tier", [Tier(False, (4, 8)), Tier(True, (2,))], ids=str)
def test_a_row_is_found_after_rows_of_one_tier(backend, device, tier):
    """All rows before it have one tier, which makes the counts of nibbles as large as they can be."""
    p = problem((70, 45, 32, 1), torch.float64, device, tiers=[tier])
    ids = torch.arange(70, device=device)
    assert_close(p.ours(ids, *p.factors, backend=backend), p.plain(ids, *p.factors))


def test_codes_at_the_ends_of_the_format(level):
    """Levels at the limits of int8, values of 8 bits at -127.5 and 127.5; padding beyond H is ignored."""
    levels = torch.zeros(17, 16, dtype=torch.int8)
    levels[16, 0::4], levels[16, 3::4] = -128, 127  # by the further bits of a value
    codes = {
        0: torch.tensor([[0, 12] * 16]).to(torch.uint8),
        1: torch.tensor([[0, 255] * 16]).to(torch.uint8),
    }
    tiers = [Tier(False, (4,)), Tier(False, (8,))]
    table = pack(torch.tensor([0, 1]), codes, tiers, levels, torch.ones(2), None, None, 31)
    expected = torch.tensor([[-4.0, 4 - 2**-5], [-127.5, 127.5]]).repeat(1, 16)[:, :31]
    assert torch.equal(table.decode(torch.arange(2)), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_a_row_do_not_depend_on_its_batch(level, dtype):
    p = problem((300, 210, 96, 1), dtype)
    rows = p.ours(torch.arange(300), *p.factors)
    for count in (1, 2, 5, 11, 23, 49, 97, 300):
        ids = torch.randint(0, 300, (count,))
        assert torch.equal(p.ours(ids, *p.factors), rows[ids]), count


# One token; as many rows as make several tasks.
@pytest.mark.parametrize("shape", [(900, 1100, 96, 1), (500, 384, 128, 3000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_the_same_bits_for_any_number_of_threads(native, shape, dtype):
    p = problem(shape, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4, 1):
            torch.set_num_threads(threads)
            results.append(p.ours(p.ids, *p.factors, backend=native))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    wide = [f.double() for f in p.factors]
    assert_no_worse_than(results[0], p.plain(p.ids, *p.factors), p.plain(p.ids, *wide))


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("offset", [True, False])
def test_gradcheck(backend, device, ids_dtype, offset):
    p = small(torch.float64, device, offset=offset, ids_dtype=ids_dtype)
    leaves = [f.requires_grad_() for f in p.factors]
    assert torch.autograd.gradcheck(lambda *f: p.ours(p.ids, *f, scale=1.5, backend=backend), leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.usefixtures("poisoned")
def test_scale_is_applied_before_the_only_rounding(backend, device, dtype, offset):
    p = problem((97, 97, 96, 150), dtype, device, offset)
    exact = p.plain(p.ids, *(f.double() for f in p.factors)) * 25.25
    got = p.ours(p.ids, *p.factors, scale=25.25, backend=backend)
    of_values = ~p.transform[p.ids]
    assert_rounded_once(got[of_values], exact[of_values])
    # On CPUs with bf16 products, scaled coefficients are rounded to bf16 as well.
    assert_no_worse_than(got, exact.to(dtype), exact)


def test_coefficients_of_bf16_are_rounded_once_at_most(level):
    """The bound that the op states for CPUs that multiply bf16; elsewhere there is one rounding."""
    tiers = [Tier(True, (3, 2, 8)), Tier(True, (4,))]
    p = problem((200, 97, 96, 1), torch.bfloat16, offset=False, tiers=tiers)
    ids = torch.arange(200)
    wide = [f.double() for f in p.factors]
    exact = p.plain(ids, *wide)
    size = (wide[0].unsqueeze(1) * p.values).abs()[:, :96] @ wide[1].abs()
    got = p.ours(ids, *p.factors)
    if level == "avx512_bf16":
        sums = 96 * 2**-24 * size
        assert ((got - exact).abs() <= 2**-8 * (exact.abs() + 1.01 * size) + sums).all()
    else:
        assert_rounded_once(got, exact)


@pytest.mark.parametrize("size", [1e-24, 1e-26, 1e-30])
def test_rows_of_tiny_scales_are_as_exact(level, size):
    """A scale times the step of the levels would be subnormal."""
    p = problem((100, 70, 0, 1), offset=False, tiers=[Tier(False, (bits, 8, bits)) for bits in range(1, 9)])
    scales, ids = p.scales * size, torch.arange(100)
    exact = p.plain(ids, scales.double())
    assert ((p.ours(ids, scales) - exact).abs() <= 2**-23 * exact.abs()).all()


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_the_gradients_that_are_asked_for(backend, device, frozen):
    p = small(device=device)
    for position, factor in enumerate(p.factors):
        factor.requires_grad_(position != frozen)
    p.ours(p.ids, *p.factors, backend=backend).sum().backward()
    assert [f.grad is None for f in p.factors] == [position == frozen for position in range(3)]


@pytest.mark.parametrize("padding_idx", [3, -1])
def test_padding_contributes_no_gradient(backend, device, padding_idx):
    p = small(torch.float64, device)
    ids = torch.tensor([3, 1, 3, 39, 39, 20], device=device)
    leaves = [f.requires_grad_() for f in p.factors]
    p.ours(ids, *leaves, padding_idx=padding_idx, backend=backend).square().sum().backward()
    expected = [f.detach().clone().requires_grad_() for f in p.factors]
    p.plain(ids[ids != padding_idx % 40], *expected).square().sum().backward()
    assert_close([leaf.grad for leaf in leaves], [leaf.grad for leaf in expected])


def test_padding_idx_does_not_change_the_row(backend, device):
    p = small(device=device)
    leaves = [f.requires_grad_() for f in p.factors]
    padded = p.ours(p.ids, *leaves, padding_idx=int(p.ids[0]), backend=backend)
    assert torch.equal(padded, p.ours(p.ids, *leaves, backend=backend))


def test_an_infinite_entry_of_the_basis_stays_out_of_rows_of_values(backend, device):
    p = problem((97, 97, 96, 1), device=device)
    p.basis[:, 5] = float("inf")
    rows = p.ours(torch.arange(97, device=device), *p.factors, backend=backend)
    assert rows[~p.transform].isfinite().all()
    assert not rows[p.transform][:, 5].isfinite().any()


def test_reference_backward_is_autograd_of_its_forward():
    p = small(torch.float64)
    grad = torch.randn(11, p.H, dtype=torch.float64)
    leaves = [f.clone().requires_grad_() for f in p.factors]
    reference.gather_decode_forward(p.ids, *p.codes, *leaves, p.H, 0.5).backward(grad)
    arguments = (grad, p.ids, *p.codes, *p.factors[:2])
    got = reference.gather_decode_backward(*arguments, 0.5, -1, True, True, True)
    assert_close(list(got), [leaf.grad for leaf in leaves])

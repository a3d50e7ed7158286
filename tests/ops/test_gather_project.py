"""gather_project: numbers against float64, gradients, bad input, torch's transforms."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from embkern.ops import gather_project, reference
from embkern.ops.backends import unavailable
from embkern.ops.library import CPU_CAPABILITIES, cpu_capability
from tests.conftest import assert_no_worse_over_draws, assert_no_worse_than, compile_counting

OP = "gather_project"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (V, r, H, N): even; odd everything and more rows than a block; rank 1; one token; the paper's table.
SHAPES = [(64, 16, 64, 96), (101, 63, 77, 149), (37, 1, 5, 8), (50, 257, 33, 1), (30522, 75, 384, 333)]


def problem(shape, dtype=torch.float32, device="cpu", offset=True, ids_dtype=torch.int64):
    V, r, H, N = shape
    ids = (torch.rand(N, device=device) ** 3 * V).to(ids_dtype)  # skewed: many ids repeat
    codes = torch.randn(V, r, device=device).to(dtype)
    basis = (torch.randn(r, H, device=device) / r**0.5).to(dtype)
    return ids, codes, basis, torch.randn(H, device=device).to(dtype) if offset else None


def plain(ids, codes, basis, offset):
    rows = F.embedding(ids, codes) @ basis
    return rows if offset is None else rows + offset


def draw(shape, dtype, backend=None, device="cpu"):
    """Rows and gradients of a new problem: ours, plain torch's and those of float64."""
    ids, *factors = problem(shape, dtype, device)
    upstream = torch.randn(len(ids), shape[2], device=device).to(dtype)
    results = []
    for function, cast in (
        (lambda *a: gather_project(*a, backend=backend), dtype),
        (plain, dtype),
        (plain, torch.float64),
    ):
        leaves = [f.to(cast, copy=True).requires_grad_() for f in factors]
        out = function(ids, *leaves)
        out.backward(upstream.to(cast))
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert all(each.dtype == dtype for each in results[0])
    return results


def skip_without_float64(backend, device):
    if reason := unavailable(backend, OP, device, torch.float64):
        pytest.skip(reason)


@pytest.fixture(params=CPU_CAPABILITIES)
def level(request, native):
    """Every instruction set this processor has, one by one."""
    best = cpu_capability()
    if CPU_CAPABILITIES.index(request.param) > CPU_CAPABILITIES.index(best):
        pytest.skip(f"this processor has {best}")
    yield cpu_capability(request.param)
    cpu_capability(best)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_every_instruction_set_keeps_the_numerical_contract(level, dtype):
    assert cpu_capability() == level
    # ... and more rows than are packed, few rows in wide tiles, long sums, a rank beyond one block of sums.
    for shape in [*SHAPES, (500, 130, 95, 25), (500, 19, 300, 4), (40, 300, 33, 700), (30, 600, 40, 20)]:
        assert_no_worse_over_draws(lambda: draw(shape, dtype))  # noqa: B023


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_a_row_do_not_depend_on_its_batch(level, dtype):
    _, *factors = problem((300, 150, 210, 1), dtype)
    rows = gather_project(torch.arange(300), *factors)
    for count in (1, 2, 5, 11, 12, 23, 25, 97, 300):
        ids = torch.randint(0, 300, (count,))
        assert torch.equal(gather_project(ids, *factors), rows[ids]), count


def test_an_instruction_set_is_named_or_refused(native, monkeypatch):
    with pytest.raises(ValueError, match="level: expected one of portable, avx2, .*, got 'sse9'"):
        cpu_capability("sse9")
    script = "from embkern.ops.library import cpu_capability; print(cpu_capability())"
    for value, expected in (("portable", "portable"), ("sse9", "expected portable, avx2")):
        environment = os.environ | {"EMBKERN_CPU_CAPABILITY": value}
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
        if value == "portable":
            assert (run.returncode, run.stdout.strip()) == (0, expected)
        else:
            assert run.returncode != 0
            assert expected in run.stderr


@pytest.mark.parametrize("special", [float("nan"), float("inf"), 1e30], ids=str)
def test_narrow_outputs_round_like_torch(level, special):
    for dtype in (torch.bfloat16, torch.float16):
        codes = torch.tensor([[1.0], [special], [1 + 2**-8], [3.0]]).to(dtype)
        basis = torch.tensor([[1.0, 1 + 2**-7, -0.5]]).to(dtype).repeat(1, 20)
        got = gather_project(torch.arange(4), codes, basis)
        expected = (codes.float() @ basis.float()).to(dtype)
        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_forward_and_gradients_are_no_worse_than_plain_torch(backend, device, shape, dtype):
    assert_no_worse_over_draws(lambda: draw(shape, dtype, backend, device))


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("offset", [True, False])
def test_gradcheck(backend, device, ids_dtype, offset):
    skip_without_float64(backend, device)
    ids, *factors = problem((7, 3, 5, 9), torch.float64, device, offset, ids_dtype)
    leaves = [f if f is None else f.requires_grad_() for f in factors]
    assert torch.autograd.gradcheck(lambda *f: gather_project(ids, *f, scale=1.5, backend=backend), leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.usefixtures("poisoned")
def test_scale_is_applied_before_the_one_rounding(backend, device, dtype, offset):
    ids, *factors = problem((101, 63, 77, 149), dtype, device, offset)
    wide = [f if f is None else f.double() for f in factors]
    got = gather_project(ids, *factors, scale=25.25, backend=backend)
    exact = plain(ids, *wide) * 25.25
    assert_no_worse_than(got, exact.to(dtype), exact, tiny=1e-6)  # 2x of the rounding alone


@pytest.mark.parametrize("shape", [(7,), (2, 3), (0,)], ids=str)
def test_out_is_written_and_returned(backend, device, shape):
    _, *factors = problem((12, 4, 6, 1), device=device)
    ids = torch.randint(0, 12, shape, device=device)
    out = torch.full((*shape, 6), float("nan"), device=device)
    assert gather_project(ids, *factors, out=out, backend=backend) is out
    assert torch.equal(out, gather_project(ids, *factors, backend=backend))
    factors[0].requires_grad_()
    with pytest.raises(ValueError, match="out: expected None where a gradient is asked for"):
        gather_project(ids, *factors, out=out, backend=backend)


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_a_sparse_gradient_is_the_dense_one(backend, device, padding_idx):
    ids, *factors = problem((200, 8, 10, 300), device=device)
    upstream, grads = torch.randn(300, 10, device=device), []
    for sparse in (True, False):
        leaves = [f.clone().requires_grad_() for f in factors]
        rows = gather_project(ids, *leaves, padding_idx=padding_idx, sparse=sparse, backend=backend)
        grads.append(torch.autograd.grad(rows, leaves, upstream))
    codes, *others = grads[0]
    assert codes.is_sparse
    assert codes._nnz() <= 300
    assert_close((codes.to_dense(), *others), grads[1])
    assert codes.is_coalesced() == (backend == "native" and device == "cpu")
    if codes.is_coalesced():
        counted = ids if padding_idx is None else ids[ids != padding_idx]
        assert torch.equal(codes.indices()[0], counted.unique())


def test_sparse_gradients_are_refused_under_compile(native):
    ids, *factors = problem((20, 4, 6, 11))
    factors[0].requires_grad_()
    with pytest.raises(Exception, match="sparse: expected False under torch.compile"):
        torch.compile(lambda i: gather_project(i, *factors, sparse=True), backend="eager", fullgraph=True)(
            ids
        )


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_the_gradients_that_are_asked_for(backend, device, frozen):
    ids, *factors = problem((20, 4, 6, 11), device=device)
    for position, factor in enumerate(factors):
        factor.requires_grad_(position != frozen)
    gather_project(ids, *factors, backend=backend).sum().backward()
    assert [f.grad is None for f in factors] == [position == frozen for position in range(3)]


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 4), (1, 2, 3, 1)], ids=str)
def test_ids_of_any_shape(backend, device, shape):
    _, codes, basis, offset = problem((12, 4, 6, 1), device=device)
    codes.requires_grad_()
    ids = torch.randint(0, 12, shape, device=device)
    out = gather_project(ids, codes, basis, offset, backend=backend)
    assert out.shape == (*shape, 6)
    assert_close(out, plain(ids, codes, basis, offset))
    out.sum().backward()
    assert codes.grad.shape == codes.shape


@pytest.mark.parametrize("padding_idx", [3, -1])
def test_padding_contributes_no_gradient(backend, device, padding_idx):
    skip_without_float64(backend, device)
    _, *factors = problem((9, 4, 6, 1), torch.float64, device)
    ids = torch.tensor([3, 1, 3, 8, 8], device=device)
    leaves = [f.requires_grad_() for f in factors]
    gather_project(ids, *leaves, padding_idx=padding_idx, backend=backend).square().sum().backward()
    got = [leaf.grad for leaf in leaves]
    expected = [f.detach().clone().requires_grad_() for f in factors]
    plain(ids[ids != padding_idx % 9], *expected).square().sum().backward()
    assert_close(got, [leaf.grad for leaf in expected])


def test_padding_idx_does_not_change_the_row(backend, device):
    ids, *factors = problem((9, 4, 6, 5), device=device)
    factors[0].requires_grad_()
    assert torch.equal(
        gather_project(ids, *factors, backend=backend),
        gather_project(ids, *factors, padding_idx=int(ids[0]), backend=backend),
    )


@pytest.mark.parametrize("layout", ["columns", "rows apart"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_contiguous_arguments(backend, device, layout, dtype):
    ids, codes, basis, offset = problem((30, 8, 10, 24), dtype, device)
    strided = (
        ids.repeat_interleave(2)[::2],
        codes.t().contiguous().t() if layout == "columns" else torch.cat((codes, codes), 1)[:, :8],
        basis.repeat_interleave(3, 1)[:, ::3]
        if layout == "columns"
        else torch.cat((basis, basis), 1)[:, :10],
        offset.repeat_interleave(2)[::2],
    )
    assert not strided[1].is_contiguous()
    contiguous = gather_project(ids, codes, basis, offset, backend=backend)
    assert torch.equal(gather_project(*strided, backend=backend), contiguous)
    upstream = torch.randn(24, 10, device=device).to(dtype)
    grads = []
    for factors in (strided[1:], (codes, basis, offset)):
        leaves = [f.detach().requires_grad_() for f in factors]
        gather_project(ids, *leaves, backend=backend).backward(upstream)
        grads.append([leaf.grad for leaf in leaves])
    assert_close(*grads)


@pytest.mark.parametrize("shape", [(3, 4, 0, 5), (3, 4, 0, 1), (3, 4, 6, 0)], ids=str)
def test_empty_results_have_gradients(backend, device, shape):
    ids, *factors = problem(shape, device=device)
    leaves = [f.requires_grad_() for f in factors]
    out = gather_project(ids, *leaves, backend=backend)
    assert out.shape == (shape[3], shape[2])
    out.sum().backward()
    assert all(leaf.grad.shape == leaf.shape and not leaf.grad.any() for leaf in leaves)


def test_writing_out_is_seen_by_autograd(backend, device):
    ids, *factors = problem((12, 4, 6, 3), device=device)
    out, weight = (
        gather_project(ids, *factors, backend=backend),
        torch.ones(6, device=device, requires_grad=True),
    )
    loss = (weight * out).sum()
    gather_project(ids, *factors, scale=2.0, out=out, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_read_beyond_a_table_that_ends_at_a_page(level):
    """The last bytes of factors and offset lie before a page that may not be read."""
    script = """
import ctypes, mmap, sys, torch
from embkern.ops import gather_project
from embkern.ops.library import cpu_capability
cpu_capability(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
keep = []
def at_the_end(tensor):
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + pages * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    keep.append(memory)
    offset = pages * mmap.PAGESIZE - size
    guarded = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return guarded.view(tensor.shape).copy_(tensor)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for r, H, N in ((5, 33, 3), (4, 5, 1), (7, 47, 40), (8, 15, 30), (3, 1, 2)):
        factors = [at_the_end(torch.randn(s).to(dtype)).requires_grad_() for s in ((9, r), (r, H), (H,))]
        ids = at_the_end(torch.randint(0, 9, (N,)))
        out = gather_project(ids, *factors)
        torch.autograd.grad(out, factors, at_the_end(torch.randn(N, H).to(dtype)))
print("read nothing beyond")
"""
    run = subprocess.run([sys.executable, "-c", script, level], capture_output=True, text=True)
    assert run.stdout.strip() == "read nothing beyond", f"exit code {run.returncode}\n{run.stderr}"


@pytest.mark.parametrize("bad", [-1, 12, 2**40])
def test_an_id_out_of_range_is_an_index_error(backend, device, bad):
    if device != "cpu":
        pytest.skip("a device-side assertion ends the process")
    ids = torch.tensor([0, bad, 3])
    _, *factors = problem((12, 4, 6, 1))
    with pytest.raises(IndexError):
        gather_project(ids, *factors, backend=backend)


def test_an_id_out_of_range_is_noticed_where_rows_have_no_columns(backend, device):
    if device != "cpu":
        pytest.skip("a device-side assertion ends the process")
    for ids in (torch.tensor([0, 12]), torch.tensor(12, dtype=torch.int32)):
        with pytest.raises(IndexError, match="ids: expected 0 <= id < 12, got 12 at flat position"):
            gather_project(ids, torch.zeros(12, 4), torch.zeros(4, 0), backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_error_names_the_id(backend, device, dtype):
    if device != "cpu":
        pytest.skip("a device-side assertion ends the process")
    _, codes, *others = problem((12, 4, 6, 1), dtype)
    for ids in (torch.tensor([[0, 1], [2, 99]]), torch.arange(400).view(100, 4).clamp(max=99) // 99 * 99):
        place = int((ids.flatten() == 99).nonzero()[0])
        with pytest.raises(IndexError, match=f"ids: expected 0 <= id < 12, got 99 at flat position {place}"):
            gather_project(ids, codes, *others, backend=backend)
    with pytest.raises(IndexError, match="ids: expected 0 <= id < 0, got 0 at flat position 0"):
        gather_project(torch.tensor([0]), codes[:0], *others, backend=backend)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(ids=torch.zeros(3)), TypeError, "ids: expected dtype"),
        (dict(ids=torch.zeros(3, dtype=torch.int16)), TypeError, "ids: expected dtype"),
        (dict(ids=torch.zeros(3, dtype=torch.bool)), TypeError, "ids: expected dtype"),
        (dict(codes=torch.zeros(12)), ValueError, "codes: expected shape"),
        (dict(basis=torch.zeros(5, 6)), ValueError, "basis: expected shape .* r = 4"),
        (dict(basis=torch.zeros(4, 6).half()), TypeError, "basis: expected dtype torch.float32"),
        (dict(offset=torch.zeros(7)), ValueError, r"offset: expected shape \(6,\)"),
        (dict(offset=torch.zeros(6, device="meta")), ValueError, "offset: expected device cpu"),
        (dict(out=torch.zeros(3, 7)), ValueError, r"out: expected a contiguous tensor of shape \(3, 6\)"),
        (dict(out=torch.zeros(6, 3).t()), ValueError, "out: expected a contiguous tensor"),
        (dict(out=torch.zeros(3, 6).half()), TypeError, "out: expected dtype torch.float32"),
        (dict(padding_idx=12), ValueError, "padding_idx: expected an id below 12, got 12"),
        (dict(backend="cuda"), ValueError, "backend: expected one of native, triton, torch, got 'cuda'"),
        (dict(backend="triton"), RuntimeError, "'triton' cannot serve gather_project: "),
        (
            dict(
                codes=torch.zeros(12, 4, dtype=torch.int8),
                basis=torch.zeros(4, 6, dtype=torch.int8),
                offset=None,
            ),
            TypeError,
            "torch.int8 is not supported",
        ),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = dict(
        ids=torch.zeros(3, dtype=torch.int64),
        codes=torch.zeros(12, 4),
        basis=torch.zeros(4, 6),
        offset=torch.zeros(6),
    )
    with pytest.raises(error, match=message):
        gather_project(**arguments | change)


def test_no_dtype_change_under_autocast(backend, device):
    ids, *factors = problem((30, 8, 10, 24), device=device)
    leaves = [f.requires_grad_() for f in factors]
    with torch.autocast(device, dtype=torch.bfloat16):
        out = gather_project(ids, *leaves, backend=backend)
        out.sum().backward()
    assert out.dtype == torch.float32
    assert_close(out, plain(ids, *factors))
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


# (V, r, H, N): blocks of rows; columns split between threads; one token on several threads.
@pytest.mark.parametrize("shape", [(500, 33, 70, 2000), (900, 150, 1100, 300), (900, 150, 1100, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_the_same_bits_for_any_number_of_threads(native, shape, dtype):
    ids, *factors = problem(shape, dtype)
    upstream = torch.randn(shape[3], shape[2]).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4, 1):
            torch.set_num_threads(threads)
            leaves = [f.clone().requires_grad_() for f in factors]
            out = gather_project(ids, *leaves, backend=native)
            out.backward(upstream)
            results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    wide = [f.double() for f in factors]
    assert_no_worse_than(results[0][0], plain(ids, *factors), plain(ids, *wide))


def test_raw_ops_pass_opcheck(native):
    ids, codes, basis, offset = problem((20, 4, 6, 11))
    grad = torch.randn(11, 6)
    ops = torch.ops.embkern
    for given in (offset, None):
        torch.library.opcheck(ops.gather_project_forward.native, (ids, codes, basis, given, 0.5))
        out = torch.empty(11, 6)
        torch.library.opcheck(ops.gather_project_out.native, (ids, codes, basis, given, 0.5, out))
    for needs in ((True, True, True), (False, True, False)):
        arguments = (grad, ids, codes, basis, 0.5, 2, *needs, False)
        torch.library.opcheck(ops.gather_project_backward.native, arguments)


def test_compiles_to_one_graph_without_recompiling(backend, device):
    _, *factors = problem((40, 8, 10, 1), device=device)
    leaves = [f.requires_grad_() for f in factors]
    compiled, graphs = compile_counting(
        lambda ids, *f: gather_project(ids, *f, padding_idx=0, backend=backend).square().sum()
    )
    for shape in ((5,), (9,), (33,)):
        ids = torch.randint(0, 40, shape, device=device)
        for leaf in leaves:
            leaf.grad = None
        compiled(ids, *leaves).backward()
        got = [leaf.grad.clone() for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        gather_project(ids, *leaves, padding_idx=0, backend=backend).square().sum().backward()
        assert_close(got, [leaf.grad for leaf in leaves])
    assert len(graphs) == 2, "one forward and one backward graph for every number of ids"


def test_functional_grad_works(backend, device):
    skip_without_float64(backend, device)
    ids, *factors = problem((20, 4, 6, 11), torch.float64, device)
    got = torch.func.grad(lambda c: gather_project(ids, c, *factors[1:], backend=backend).square().sum())(
        factors[0]
    )
    leaf = factors[0].clone().requires_grad_()
    plain(ids, leaf, *factors[1:]).square().sum().backward()
    assert_close(got, leaf.grad)


def test_forward_mode_ad_never_drops_a_tangent(backend, device):
    ids, codes, basis, offset = problem((20, 4, 6, 11), device=device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(codes, torch.ones_like(codes))
        with pytest.raises(NotImplementedError, match="jvp"):
            gather_project(ids, dual, basis, offset, backend=backend)


def test_a_second_derivative_is_refused_not_dropped(backend, device):
    ids, codes, basis, _ = problem((20, 4, 6, 11), device=device)
    leaf = basis.clone().requires_grad_()
    for scalar in (lambda rows: rows.sum(), lambda rows: rows.square().sum()):
        loss = scalar(gather_project(ids, codes, leaf, backend=backend))
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            (loss + grad.square().sum()).backward()
    inner = torch.func.grad(lambda d: gather_project(ids, codes, d, backend=backend).square().sum())
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.func.grad(lambda d: inner(d).square().sum())(basis)


@pytest.mark.parametrize("shape", [(3, 16, 384, 4000), (1, 16, 384, 2048), (3000, 16, 96, 9000)], ids=str)
def test_long_sums_are_no_worse_than_plain_torch(backend, device, shape):
    """Thousands of rows go into one gradient: a running fp32 sum would lose digits."""
    ids, *factors = problem(shape, device=device)
    upstream = torch.randn(shape[3], shape[2], device=device)
    grads = []
    for function, cast in (
        (lambda *a: gather_project(*a, backend=backend), torch.float32),
        (plain, torch.float32),
        (plain, torch.float64),
    ):
        leaves = [f.to(cast, copy=True).requires_grad_() for f in factors]
        function(ids, *leaves).backward(upstream.to(cast))
        grads.append([leaf.grad for leaf in leaves])
    for ours, native, exact in zip(*grads, strict=True):
        assert_no_worse_than(ours, native, exact)


def test_reference_backward_is_autograd_of_its_forward():
    ids, *factors = problem((9, 4, 6, 13), torch.float64)
    grad = torch.randn(13, 6, dtype=torch.float64)
    leaves = [f.clone().requires_grad_() for f in factors]
    reference.gather_project_forward(ids, *leaves, 0.5).backward(grad)
    _, *got = reference.gather_project_backward(grad, ids, *factors[:2], 0.5, -1, True, True, True, False)
    assert_close(got, [leaf.grad for leaf in leaves])


def test_shapes_on_the_meta_device():
    ids, *factors = problem((20, 4, 6, 11))
    out = gather_project(ids.to("meta"), *(f.to("meta") for f in factors))
    assert out.is_meta
    assert out.shape == (11, 6)


def test_offsets_beyond_two_to_the_31st(native):
    """Row 2^25 of a table of 64 columns starts at element 2^31; only the pages that are touched exist."""
    V, r = 2**25 + 3, 64
    codes = torch.empty(0, dtype=torch.float16).set_(torch.UntypedStorage(V * r * 2), 0, (V, r), (r, 1))
    codes[-1] = torch.arange(r).half() / r
    codes[0] = 0
    basis = torch.eye(r, 8, dtype=torch.float16)
    out = gather_project(torch.tensor([V - 1, 0]), codes, basis, backend=native)
    assert_close(out, torch.stack([codes[-1, :8], codes[0, :8]]))

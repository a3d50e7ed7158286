"""gather_project: arguments, memory, torch's transforms."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from embkern.ops import gather_project
from embkern.ops.library import cpu_capability
from tests.conftest import compile_counting
from tests.ops.factorised_problems import plain, problem, skip_without_float64
from tests.ops.guard_pages import assert_reads_nothing_beyond

OP = "gather_project"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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


@pytest.mark.parametrize("shape", [(7,), (2, 3), (0,)], ids=str)
def test_out_is_written_and_returned(backend, device, shape):
    _, *factors = problem((12, 4, 6, 1), device=device)
    ids = torch.randint(0, 12, shape, device=device)
    out = torch.full((*shape, 6), float("nan"), device=device)
    assert gather_project(ids, *factors, out=out, backend=backend) is out
    assert torch.equal(out, gather_project(ids, *factors, backend=backend))
    factors[0].requires_grad_()
    with pytest.raises(ValueError, match="out: expected None where a gradient is needed"):
        gather_project(ids, *factors, out=out, backend=backend)


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


@pytest.mark.usefixtures("native")
def test_no_read_beyond_a_table_that_ends_at_a_page():
    """The last bytes of factors and offset lie before a page without read permission."""
    assert_reads_nothing_beyond("""
import torch
from embkern.ops import gather_project
from tests.ops.guard_pages import at_the_end
def run():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for r, H, N in ((5, 33, 3), (4, 5, 1), (7, 47, 40), (8, 15, 30), (3, 1, 2)):
            factors = [at_the_end(torch.randn(s).to(dtype)).requires_grad_() for s in ((9, r), (r, H), (H,))]
            ids = at_the_end(torch.randint(0, 9, (N,)))
            out = gather_project(ids, *factors)
            torch.autograd.grad(out, factors, at_the_end(torch.randn(N, H).to(dtype)))
""")


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


def test_offsets_beyond_two_to_the_31st(native):
    """Row 2^25 of a table of 64 columns starts at element 2^31; only accessed pages have memory."""
    V, r = 2**25 + 3, 64
    codes = torch.empty(0, dtype=torch.float16).set_(torch.UntypedStorage(V * r * 2), 0, (V, r), (r, 1))
    codes[-1] = torch.arange(r).half() / r
    codes[0] = 0
    basis = torch.eye(r, 8, dtype=torch.float16)
    out = gather_project(torch.tensor([V - 1, 0]), codes, basis, backend=native)
    assert_close(out, torch.stack([codes[-1, :8], codes[0, :8]]))


def test_sparse_gradients_are_refused_under_compile(native):
    ids, *factors = problem((20, 4, 6, 11))
    factors[0].requires_grad_()
    with pytest.raises(Exception, match="sparse: expected False under torch.compile"):
        torch.compile(lambda i: gather_project(i, *factors, sparse=True), backend="eager", fullgraph=True)(
            ids
        )


def test_no_dtype_change_under_autocast(backend, device):
    ids, *factors = problem((30, 8, 10, 24), device=device)
    leaves = [f.requires_grad_() for f in factors]
    with torch.autocast(device, dtype=torch.bfloat16):
        out = gather_project(ids, *leaves, backend=backend)
        out.sum().backward()
    assert out.dtype == torch.float32
    assert_close(out, plain(ids, *factors))
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


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


def test_shapes_on_the_meta_device():
    ids, *factors = problem((20, 4, 6, 11))
    out = gather_project(ids.to("meta"), *(f.to("meta") for f in factors))
    assert out.is_meta
    assert out.shape == (11, 6)

"""The Triton kernels of gather_project, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from triton.runtime import interpreter

from embkern.ops import gather_project
from embkern.triton import gather_project as gp
from embkern.triton.gather_project.grad_codes import segment_launches
from embkern.triton.launch import Launch
from tests.conftest import assert_no_worse_than
from tests.ops.factorised_problems import plain as unscaled
from tests.ops.factorised_problems import problem

# (V, r, H, N). Even; odd everything; rank 1; one token; the table of the paper; a full row block; one row
# more; blocks without a rest; a batch; a rank that takes steps for every dtype.
SHAPES = [
    (64, 16, 64, 96),
    (101, 63, 77, 149),
    (37, 1, 5, 8),
    (50, 257, 33, 1),
    (30522, 75, 384, 333),
    (40, 63, 31, 16),
    (40, 256, 40, 17),
    (40, 75, 33, 128),
    (19, 16, 21, 1100),
    (40, 520, 33, 20),
]
SCALE = 0.7


def plain(ids, codes, basis, offset, scale):
    return scale * unscaled(ids, codes, basis, offset)


def plain_with_gradients(ids, factors, upstream, cast, scale=SCALE):
    leaves = [f.to(cast, copy=True).requires_grad_() for f in factors]
    out = plain(ids, *leaves, *[None] * (3 - len(leaves)), scale)
    out.backward(upstream.to(cast))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def backward(grad, ids, codes, basis, *, scale=SCALE, padding_idx=-1, needs=(True, True, True), sparse=False):
    return gp.gather_project_backward(grad, ids, codes, basis, scale, padding_idx, *needs, sparse)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_forward_and_gradients_are_no_worse_than_plain_torch(shape, dtype):
    ids, *factors = problem(shape, dtype)
    upstream = torch.randn(shape[3], shape[2]).to(dtype)
    out = gp.gather_project_forward(ids, *factors, SCALE)
    ours = [out, *backward(upstream, ids, *factors[:2])[1:]]
    native = plain_with_gradients(ids, factors, upstream, dtype)
    exact = plain_with_gradients(ids, factors, upstream, torch.float64)
    for got, theirs, true in zip(ours, native, exact, strict=True):
        assert got.dtype == dtype
        assert got.shape == true.shape
        assert_no_worse_than(got, theirs, true)


# Rows on 16 bytes of which the last vector is loaded whole; not on 16 bytes; a rank in steps; a single row.
@pytest.mark.parametrize(
    ("shape", "apart"),
    [
        ((50, 75, 40, 90), 5),
        ((50, 75, 40, 90), 4),
        ((40, 520, 33, 20), 8),
        ((40, 523, 33, 20), 5),
        ((1, 9, 8, 3), 7),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("whole", [True, False], ids=["memory after the last row", "none"])
@pytest.mark.usefixtures("poisoned")
def test_codes_with_rows_apart_are_read_where_they_are(monkeypatch, shape, apart, dtype, whole):
    ids, codes, *others = problem(shape, dtype)
    (V, r), upstream = codes.shape, torch.randn(shape[3], shape[2]).to(dtype)
    memory = torch.full(((V - 1) * (r + apart) + r + apart * whole,), torch.nan, dtype=dtype)
    view = memory.as_strided((V, r), (r + apart, 1)).copy_(codes)
    read = []
    for name in ("forward_launch", "grad_basis_launches", "project_grad_launch"):
        launcher = getattr(gp, name)

        def record(grad_or_ids, *arguments, launcher=launcher):
            read.extend(each for each in arguments if each is view)
            return launcher(grad_or_ids, *arguments)

        monkeypatch.setattr(gp, name, record)
    leaves = [each.clone().requires_grad_() for each in others]
    out = gather_project(ids, view.requires_grad_(), *leaves, scale=SCALE, backend="triton")
    out.backward(upstream)
    assert len(read) >= 2
    ours = [out.detach(), view.grad, *(each.grad for each in leaves)]
    native = plain_with_gradients(ids, (codes, *others), upstream, dtype)
    exact = plain_with_gradients(ids, (codes, *others), upstream, torch.float64)
    for got, theirs, true in zip(ours, native, exact, strict=True):
        assert_no_worse_than(got, theirs, true)


@pytest.mark.usefixtures("poisoned")
def test_fp64_sums_in_fp64():
    ids, *factors = problem((30, 21, 19, 70), torch.float64)
    upstream = torch.randn(70, 19, dtype=torch.float64)
    ours = [
        gp.gather_project_forward(ids, *factors, 2.0),
        *backward(upstream, ids, *factors[:2], scale=2.0)[1:],
    ]
    assert_close(
        ours, plain_with_gradients(ids, factors, upstream, torch.float64, 2.0), rtol=1e-12, atol=1e-13
    )


@pytest.mark.usefixtures("poisoned")
def test_int32_ids_of_any_shape_without_offset_into_out():
    ids, codes, basis, _ = problem((23, 9, 14, 12), ids_dtype=torch.int32)
    ids = ids.view(2, 3, 2)
    out = torch.full((2, 3, 2, 14), float("nan"))
    gp.gather_project_out(ids, codes, basis, None, SCALE, out)
    assert_close(out, plain(ids, codes, basis, None, SCALE))
    assert torch.equal(out, gp.gather_project_forward(ids, codes, basis, None, SCALE))
    upstream = torch.randn(12, 14)
    got = backward(upstream, ids, codes, basis, needs=(True, True, False))[1:3]
    assert_close(list(got), plain_with_gradients(ids.flatten(), (codes, basis), upstream, torch.float32)[1:])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_padding_counts_for_nothing_whatever_its_gradient(sparse):
    _, codes, basis, offset = problem((9, 20, 6, 1))
    ids = torch.tensor([3, 1, 3, 8, 8, 3])
    upstream = torch.randn(6, 6)
    upstream[ids == 3] = float("nan")
    code_ids, *got = backward(upstream, ids, codes, basis, padding_idx=3, sparse=sparse)
    keep = ids != 3
    exact = plain_with_gradients(ids[keep], (codes, basis, offset), upstream[keep], torch.float32)[1:]
    if sparse:
        assert code_ids.dtype == torch.int64
        assert torch.equal(code_ids, ids)
        assert not got[0][~keep].any()
        got[0] = torch.zeros_like(codes).index_add(0, code_ids, got[0])
    else:
        assert code_ids.numel() == 0
    assert_close(got, exact)


@pytest.mark.parametrize("sparse", [False, True])
def test_empty_ids_launch_nothing(monkeypatch, sparse):
    monkeypatch.setattr(Launch, "run", lambda self: pytest.fail("launched"))
    _, codes, basis, offset = problem((9, 4, 6, 1))
    ids = torch.empty(0, 3, dtype=torch.int32)
    assert gp.gather_project_forward(ids, codes, basis, offset, 1.0).shape == (0, 3, 6)
    code_ids, grad_codes, grad_basis, grad_offset = backward(
        torch.empty(0, 6), ids, codes, basis, sparse=sparse
    )
    assert code_ids.shape == (0,)
    assert torch.equal(grad_codes, codes.new_zeros(0, 4) if sparse else torch.zeros_like(codes))
    assert torch.equal(grad_basis, torch.zeros_like(basis))
    assert torch.equal(grad_offset, torch.zeros_like(offset))


@pytest.mark.parametrize(
    "needs", [(False, True, True), (True, False, True), (False, False, True), (False, True, False)]
)
@pytest.mark.usefixtures("poisoned")
def test_only_the_gradients_that_are_asked_for(needs):
    ids, *factors = problem((20, 4, 6, 70))
    upstream = torch.randn(70, 6)
    got = backward(upstream, ids, *factors[:2], needs=needs)[1:]
    exact = plain_with_gradients(ids, factors, upstream, torch.float32)[1:]
    for each, expected, needed in zip(got, exact, needs, strict=True):
        if needed:
            assert_close(each, expected)
        else:
            assert each.shape == (0,)


@pytest.mark.parametrize(
    "counts",
    [
        [2500],  # one segment over more blocks than one step of the join adds
        [1, 31, 32, 33, 1, 64, 1, 62, 2, 128],  # segments that end on, before and after a block's border
        [40] + 30 * [1] + [250] + 20 * [2],
    ],
    ids=str,
)
@pytest.mark.usefixtures("poisoned")
def test_segments_of_every_length(counts):
    sorted_ids = torch.repeat_interleave(torch.arange(len(counts)) * 2 + 1, torch.tensor(counts))
    N, V = len(sorted_ids), 2 * len(counts) + 2
    order = torch.randperm(N)
    rows = torch.randn(N, 3)
    grad_codes = torch.zeros(V, 3)
    for launch in segment_launches(rows, sorted_ids, order, grad_codes):
        launch.run()
    exact = torch.zeros(V, 3, dtype=torch.float64).index_add(0, sorted_ids, rows[order].double())
    native = torch.zeros(V, 3).index_add(0, sorted_ids, rows[order])
    assert_no_worse_than(grad_codes, native, exact)
    assert not grad_codes[::2].any()


def test_an_infinite_gradient_stays_with_its_id():
    ids, *factors = problem((20, 4, 6, 70))
    upstream = torch.randn(70, 6)
    upstream[5] = float("inf")
    grad_codes = backward(upstream, ids, *factors[:2], needs=(True, False, False))[1]
    assert torch.equal((~grad_codes.isfinite()).any(1).nonzero().flatten(), ids[5:6])


@pytest.mark.parametrize("bad", [-1, 12, 2**40])
def test_an_id_out_of_range_is_an_assertion(monkeypatch, bad):
    # The interpreter skips the assertions of the kernels by default.
    options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    ids = torch.tensor([0, bad, 3])
    _, codes, basis, offset = problem((12, 4, 6, 1))
    for call in (
        lambda: gp.gather_project_forward(ids, codes, basis, offset, 1.0),
        lambda: backward(torch.ones(3, 6), ids, codes, basis, needs=(True, False, False)),
        lambda: backward(torch.ones(3, 6), ids, codes, basis, needs=(True, False, False), sparse=True),
        lambda: backward(torch.ones(3, 6), ids, codes, basis, needs=(False, True, False)),
    ):
        with pytest.raises(Exception, match="an id is out of range"):
            call()


@pytest.mark.parametrize("bad", [-1, 12, 2**40])
@pytest.mark.usefixtures("poisoned")
def test_an_id_out_of_range_reads_and_writes_nothing(bad):
    """Until the assertion stops the kernel, other threads must not access memory outside the table."""
    ids = torch.tensor([0, bad, 3])
    _, codes, basis, offset = problem((12, 4, 6, 1))
    assert torch.equal(gp.gather_project_forward(ids, codes, basis, offset, 1.0)[1], offset)
    upstream = torch.randn(3, 6)
    got = backward(upstream, ids, codes, basis)[1:3]
    keep = torch.tensor([0, 2])
    exact = plain_with_gradients(ids[keep], (codes, basis), upstream[keep], torch.float32)[1:]
    assert_close(list(got), exact)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_rank_zero_is_the_offset_and_has_its_gradient_alone(sparse):
    ids, codes, basis, offset = torch.tensor([3, 0, 3]), torch.empty(7, 0), torch.empty(0, 6), torch.randn(6)
    assert torch.equal(gp.gather_project_forward(ids, codes, basis, offset, 2.0), 2 * offset.repeat(3, 1))
    upstream = torch.randn(3, 6)
    for needs in ((True, True, True), (True, True, False), (False, True, False), (True, False, False)):
        _, grad_codes, grad_basis, grad_offset = backward(
            upstream, ids, codes, basis, needs=needs, sparse=sparse, scale=1.0
        )
        assert grad_codes.numel() == grad_basis.numel() == 0
        assert_close(grad_offset, upstream.sum(0) if needs[2] else torch.empty(0))


def lazy(V, r):
    """A table whose memory exists only where it is accessed."""
    return torch.empty(0, dtype=torch.float16).set_(torch.UntypedStorage(V * r * 2), 0, (V, r), (r, 1))


def test_offsets_beyond_two_to_the_31st():
    """Row 2^25 of a table of 64 columns starts at element 2^31."""
    V, r = 2**25 + 3, 64
    codes = lazy(V, r)
    codes[-1] = torch.arange(r).half() / r
    codes[0] = 0
    basis = torch.eye(r, 8, dtype=torch.float16)
    ids = torch.tensor([V - 1, 0], dtype=torch.int32)
    out = gp.gather_project_forward(ids, codes, basis, None, 1.0)
    assert_close(out, torch.stack([codes[-1, :8], codes[0, :8]]))

    upstream = torch.randn(2, 8).half()
    grad_basis = backward(upstream, ids, codes, basis, scale=1.0, needs=(False, True, False))[2]
    assert_close(grad_basis, torch.outer(codes[-1], upstream[0]))

    grad_codes, rows = lazy(V, r), torch.randn(40, r)
    sorted_ids = torch.tensor([0] + 39 * [V - 1], dtype=torch.int32)  # the last segment crosses a block
    for launch in segment_launches(rows, sorted_ids, torch.arange(40), grad_codes):
        launch.run()
    assert_close(grad_codes[-1], rows[1:].sum(0).half())
    assert_close(grad_codes[0], rows[0].half())

"""gather_decode: arguments, memory, torch's transforms."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from embkern.ops import gather_decode
from embkern.ops.gather_decode import decode_rows
from embkern.ops.packed_format import PackedTensors
from embkern.tables.packed import TENSORS
from tests.conftest import compile_counting
from tests.ops.guard_pages import assert_reads_nothing_beyond
from tests.ops.packed_problems import problem, random_levels, small

OP = "gather_decode"


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 4), (1, 2, 3, 1)], ids=str)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_ids_of_any_shape(backend, device, shape, ids_dtype):
    p = small(device=device)
    leaves = [f.requires_grad_() for f in p.factors]
    ids = torch.randint(0, 40, shape, device=device, dtype=ids_dtype)
    out = p.ours(ids, *leaves, backend=backend)
    assert out.shape == (*shape, p.H)
    assert_close(out, p.plain(ids, *leaves))
    out.sum().backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)
    assert ids.numel() or not any(leaf.grad.any() for leaf in leaves)


def test_non_contiguous_arguments(backend, device):
    p = problem((97, 97, 96, 50), device=device)

    def apart(tensor):
        return tensor.repeat_interleave(2, -1)[..., ::2]

    strided = gather_decode(
        apart(p.ids),
        *map(apart, p.codes),
        apart(p.scales),
        p.basis.t().contiguous().t(),
        apart(p.offset),
        embedding_dim=p.H,
        backend=backend,
    )
    assert torch.equal(strided, p.ours(p.ids, *p.factors, backend=backend))


@pytest.mark.usefixtures("native")
def test_no_read_beyond_tensors_that_end_at_a_page():
    assert_reads_nothing_beyond("""
import torch
from tests.ops.packed_problems import every_tier, guarded, problem
def run():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for H, K in ((33, 32), (97, 96)):
            for tier in every_tier(H, K):  # the last record's width decides what lies beyond it
                for N in (1, 40):
                    p = problem((35, H, K, N), dtype, tiers=[tier])
                    p.ids[-1] = 34
                    p = guarded(p)
                    p.ours(p.ids, *p.factors)
""")


CORRUPT = [
    ("directory", (1, 0), 2**31 - 1, "directory: expected records within their"),
    ("directory", (1, 0), -(2**31), "directory: expected records within their"),
    ("directory", (1, 1), -1, "tiers below 4, got tier 15"),
    ("tiers", (0, 1), 9, "tiers: expected up to 8 bits in a group of the row, got 9 in group 0 of tier 0"),
    ("tiers", (0, 2), 1, "tiers: expected up to 8 bits in a group of the row, got 1 in group 1 of tier 0"),
    ("tiers", (2, 2), 1, "in group 1 of tier 2"),
]


@pytest.mark.parametrize(("name", "entry", "value", "message"), CORRUPT)
@pytest.mark.parametrize("count", [1, 40])
def test_corrupt_codes_are_refused_before_a_read(native, name, entry, value, message, count):
    """The native op reads no record outside the tensors of a table that was never checked."""
    p = small()
    codes = dict(zip(TENSORS, p.codes, strict=False))
    codes["tiers"] = F.pad(codes["tiers"], (0, 1))  # This second group is beyond the row and the basis.
    codes[name][entry] = value
    ids = torch.arange(40)[-count:]
    arguments = (ids, *codes.values(), p.scales, p.basis, p.offset)
    with pytest.raises(ValueError, match=message):
        gather_decode(*arguments, embedding_dim=p.H, backend=native)


def test_coefficients_without_a_basis_are_refused(native):
    p = small()
    with pytest.raises(ValueError, match="tiers: expected up to 8 bits in a group of the row"):
        gather_decode(p.ids, *p.codes, p.scales, embedding_dim=p.H, backend=native)


@pytest.mark.parametrize("bad", [-1, 40, 2**40])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_an_id_out_of_range_is_an_index_error(backend, device, bad, requires_grad):
    if device != "cpu":
        pytest.skip("a device-side assertion ends the process")
    p = small()
    p.scales.requires_grad_(requires_grad)
    for ids in (torch.tensor([0, bad, 3]), torch.tensor(bad)):
        with pytest.raises(IndexError):
            p.ours(ids, *p.factors, backend=backend)


def test_the_error_names_the_id(backend, device):
    if device != "cpu":
        pytest.skip("a device-side assertion ends the process")
    p = small()
    with pytest.raises(IndexError, match="ids: expected 0 <= id < 40, got 99 at flat position 3"):
        p.ours(torch.tensor([[0, 1], [2, 99]]), *p.factors, backend=backend)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(ids=torch.zeros(3)), TypeError, "ids: expected dtype"),
        (dict(ids=torch.zeros(3, dtype=torch.int16)), TypeError, "ids: expected dtype"),
        (dict(ids=torch.zeros(3, dtype=torch.int64, device="meta")), ValueError, "ids: expected device cpu"),
        (dict(records=torch.zeros(9)), TypeError, "records: expected dtype torch.int32"),
        (dict(records=torch.zeros(0, dtype=torch.int32)), ValueError, r"records: expected shape \(W,\)"),
        (dict(directory=torch.zeros(1, 5, dtype=torch.int32)), ValueError, r"expected shape \(2, 5\)"),
        (dict(directory=torch.zeros(2, 5)), TypeError, "directory: expected dtype torch.int32"),
        (dict(tiers=torch.zeros(4, dtype=torch.uint8)), ValueError, r"tiers: expected shape \(T, 1 \+ G\)"),
        (dict(tiers=torch.zeros(17, 2, dtype=torch.uint8)), ValueError, "T up to 16"),
        (dict(tiers=torch.zeros(4, 2, dtype=torch.int32)), TypeError, "tiers: expected dtype torch.uint8"),
        (dict(levels=torch.zeros(17, 8, dtype=torch.int8)), ValueError, r"levels: expected shape \(17, 16"),
        (dict(levels=torch.zeros(17, 16)), TypeError, "levels: expected dtype torch.int8"),
        (dict(scales=torch.zeros(40, 1)), ValueError, r"scales: expected shape \(40,\)"),
        (dict(basis=torch.zeros(31, 5)), ValueError, "basis: expected shape .* a multiple of 32"),
        (dict(basis=torch.zeros(32, 6)), ValueError, r"basis: expected shape \(K, 5\)"),
        (dict(basis=torch.zeros(32, 5).half()), TypeError, "basis: expected dtype torch.float32"),
        (dict(offset=torch.zeros(6)), ValueError, r"offset: expected shape \(5,\)"),
        (dict(offset=torch.zeros(5, device="meta")), ValueError, "offset: expected device cpu"),
        (dict(embedding_dim=6), ValueError, r"basis: expected shape \(K, 6\)"),
        (dict(padding_idx=40), ValueError, "padding_idx: expected an id below 40, got 40"),
        (dict(backend="cuda"), ValueError, "backend: expected one of native, triton, torch, got 'cuda'"),
        (dict(backend="triton"), RuntimeError, "'triton' cannot serve gather_decode: "),
        (dict(scales=torch.zeros(40, dtype=torch.int8)), TypeError, "torch.int8 is not supported"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    p = small()
    arguments = dict(zip(TENSORS, (*p.codes, p.scales, p.basis, p.offset), strict=True))
    with pytest.raises(error, match=message):
        gather_decode(**dict(ids=p.ids, embedding_dim=p.H) | arguments | change)


def test_a_checked_table_is_decoded_without_checks(backend, device, monkeypatch):
    """Only the ids are checked; the rows and gradients are those of the public op."""
    p = small(device=device)
    leaves = [f.requires_grad_() for f in p.factors]
    packed = PackedTensors(*p.codes, *leaves)
    options = dict(scale=1.5, padding_idx=3, backend=backend)
    expected = gather_decode(p.ids, *packed, embedding_dim=p.H, **options)
    module = sys.modules[decode_rows.__module__]
    monkeypatch.setattr(module, "check_packed", lambda *_: pytest.fail("the table is checked again"))
    rows = decode_rows(p.ids, packed, p.H, **options)
    assert torch.equal(rows, expected)
    upstream = torch.randn_like(rows)
    assert_close(*(torch.autograd.grad(each, leaves, upstream) for each in (rows, expected)))
    strided = packed._replace(tiers=packed.tiers.repeat_interleave(2, 1)[:, ::2])
    assert torch.equal(decode_rows(p.ids, strided, p.H, **options), expected)


def test_ids_are_checked_even_for_a_checked_table(backend, device):
    if device != "cpu":
        pytest.skip("a device-side assertion ends the process")
    p = small()
    packed = PackedTensors(*p.codes, *p.factors)
    with pytest.raises(IndexError, match="ids: expected 0 <= id < 40, got 40 at flat position 1"):
        decode_rows(torch.tensor([0, 40]), packed, p.H, backend=backend)
    for ids in (torch.zeros(2), torch.zeros(2, dtype=torch.int16)):
        with pytest.raises(TypeError, match="ids: expected dtype torch.int32 or torch.int64"):
            decode_rows(ids, packed, p.H, backend=backend)


@pytest.mark.parametrize("width", [0, -1, -(2**63)])
def test_rows_have_a_width(backend, device, width):
    p = small(device=device)
    with pytest.raises(ValueError, match=f"embedding_dim: expected at least 1, got {width}"):
        gather_decode(p.ids, *p.codes, p.scales, embedding_dim=width, backend=backend)


def test_another_thread_that_writes_the_table_makes_no_read_beyond_it(native):
    """Tiers, directory and ids are written while rows are decoded; the records end before a guard page.

    A lookup reads the tensors that bound its reads once. A table that is invalid at that time is refused.
    """
    script = """
import ctypes, mmap, threading, time, torch
from embkern.ops import gather_decode
from embkern.ops.gather_decode import decode_rows
from embkern.ops.packed_format import PackedTensors
V = 32 * 416
memory = mmap.mmap(-1, V * 4 + mmap.PAGESIZE)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert V * 4 % mmap.PAGESIZE == 0
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + V * 4), mmap.PAGESIZE, 0) == 0
records = torch.frombuffer(memory, dtype=torch.int32, count=V)  # a word, one group of one bit, for every row
directory = torch.zeros(V // 32, 5, dtype=torch.int32)
directory[:, 0] = torch.arange(V // 32) * 32
tiers, ids = torch.tensor([[0, 1]], dtype=torch.uint8), torch.arange(V - 1, -1, -1)
levels, scales = torch.zeros(17, 16, dtype=torch.int8), torch.ones(V)
changed = [(tiers[0, 1:], 8), (directory[-1], 2**30), (ids[-1:], 2**40)]
before, done = [part.clone() for part, _ in changed], False
def write():
    while not done:
        for (part, wrong), right in zip(changed, before):
            part.fill_(wrong)
            part.copy_(right)
writer = threading.Thread(target=write)
writer.start()
decoded, end = 0, time.monotonic() + 1
while time.monotonic() < end:
    try:
        gather_decode(ids, records, directory, tiers, levels, scales, embedding_dim=32, backend="native")
        decoded += 1
    except (ValueError, IndexError) as error:
        assert "expected" in str(error)
done = True
writer.join()
assert decoded > 0
print("read nothing beyond")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.strip() == "read nothing beyond", f"exit code {run.returncode}\n{run.stderr}"


def test_offsets_beyond_two_to_the_31st(native):
    """A record at word 2^30; memory exists only for pages that are accessed."""
    words = 2**30
    records = torch.empty(0, dtype=torch.int32).set_(torch.UntypedStorage((words + 2) * 4), 0, (words + 2,))
    last = torch.tensor([123456789, -987654321], dtype=torch.int32)
    records[-2:] = last
    tiers, levels = torch.tensor([[0, 1]], dtype=torch.uint8), random_levels()

    def rows(records, start):
        codes = (records, torch.tensor([[start, 0, 0, 0, 0]], dtype=torch.int32), tiers, levels)
        ids = torch.tensor([0, 1])
        return gather_decode(ids, *codes, torch.ones(2), embedding_dim=30, backend=native)

    assert torch.equal(rows(records, words), rows(last, 0))


def test_no_dtype_change_under_autocast(backend, device):
    p = small(device=device)
    leaves = [f.requires_grad_() for f in p.factors]
    with torch.autocast(device, dtype=torch.bfloat16):
        out = p.ours(p.ids, *leaves, backend=backend)
        out.sum().backward()
    assert out.dtype == torch.float32
    assert_close(out, p.plain(p.ids, *p.factors))
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


def test_raw_op_passes_opcheck(native):
    p = small()
    for offset in (p.offset, None):
        arguments = (p.ids, *p.codes, p.scales, p.basis, offset, p.H, 0.5)
        torch.library.opcheck(torch.ops.embkern.gather_decode_forward.native, arguments)


def test_compiles_to_one_graph_without_recompiling(backend, device):
    p = small(device=device)
    leaves = [f.requires_grad_() for f in p.factors]
    compiled, graphs = compile_counting(
        lambda ids, *f: p.ours(ids, *f, padding_idx=0, backend=backend).square().sum()
    )
    for shape in ((7,), (9,), (33,)):  # None of these is a size of the table.
        ids = torch.randint(0, 40, shape, device=device)
        got = torch.autograd.grad(compiled(ids, *leaves), leaves)
        eager = p.ours(ids, *leaves, padding_idx=0, backend=backend).square().sum()
        assert_close(got, torch.autograd.grad(eager, leaves))
    assert len(graphs) == 2, "one forward and one backward graph for every number of ids"


def test_functional_grad_works(backend, device):
    p = small(torch.float64, device)
    scales, basis, offset = p.factors
    got = torch.func.grad(lambda d: p.ours(p.ids, scales, d, offset, backend=backend).square().sum())(basis)
    leaf = basis.clone().requires_grad_()
    p.plain(p.ids, scales, leaf, offset).square().sum().backward()
    assert_close(got, leaf.grad)


def test_forward_mode_ad_never_drops_a_tangent(backend, device):
    p = small(device=device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(p.scales, torch.ones_like(p.scales))
        with pytest.raises(NotImplementedError, match="jvp"):
            p.ours(p.ids, dual, *p.factors[1:], backend=backend)


def test_a_second_derivative_is_refused_not_dropped(backend, device):
    p = small(device=device)
    leaf = p.basis.clone().requires_grad_()
    for scalar in (lambda rows: rows.sum(), lambda rows: rows.square().sum()):
        loss = scalar(p.ours(p.ids, p.scales, leaf, p.offset, backend=backend))
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            (loss + grad.square().sum()).backward()


def test_shapes_on_the_meta_device():
    p = small()
    meta = [each.to("meta") for each in (p.ids, *p.codes, *p.factors)]
    out = gather_decode(*meta, embedding_dim=p.H)
    assert out.is_meta
    assert out.shape == (11, p.H)

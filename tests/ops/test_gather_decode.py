"""gather_decode: numbers against float64, gradients, bad input, torch's transforms."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from embkern.ops import gather_decode, reference
from embkern.ops.library import CPU_CAPABILITIES, cpu_capability
from embkern.ops.packed_format import Tier
from embkern.packed import TENSORS, pack

from ..conftest import assert_no_worse_than, compile_counting

OP = "gather_decode"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (V, H, K, N): a base model's and a small one's rows, every number of groups in the basis; odd rows with
# groups that begin beyond them; rows within one group; one token; a table without a basis.
SHAPES = [(301, 768, 128, 97), (301, 384, 192, 149), (97, 97, 96, 150), (40, 33, 32, 1), (40, 7, 0, 8)]


class Problem(NamedTuple):
    """Ids, the arguments of the op, and the values (V, H or K) that were packed, with their kind."""

    ids: Tensor
    codes: list[Tensor]
    scales: Tensor
    basis: Tensor | None
    offset: Tensor | None
    values: Tensor
    transform: Tensor
    H: int

    @property
    def factors(self) -> list[Tensor]:
        return [each for each in (self.scales, self.basis, self.offset) if each is not None]

    def ours(self, ids: Tensor, *factors: Tensor, **options) -> Tensor:
        given = iter(factors)
        rest = [each if each is None else next(given) for each in (self.scales, self.basis, self.offset)]
        return gather_decode(ids, *self.codes, *rest, embedding_dim=self.H, **options)

    def plain(self, ids: Tensor, *factors: Tensor) -> Tensor:
        scales, *rest = factors
        values = F.embedding(ids, self.values.to(scales.dtype))
        rows = F.pad(values, (0, max(0, self.H - values.shape[-1])))[..., : self.H]
        if self.basis is not None:
            basis = rest.pop(0)
            products = values[..., : len(basis)] @ basis
            rows = torch.where(self.transform[ids].unsqueeze(-1), products, rows)
        rows = scales[ids].unsqueeze(-1) * rows
        return rows + rest.pop() if rest else rows


def every_tier(H: int, K: int) -> list[Tier]:
    """Each width; widths that differ, with a group left out; rows that are cut short, to nothing too."""
    groups, terms = -(-H // 32), K // 32
    tiers = [Tier(False, (bits,) * groups) for bits in range(1, 9)]
    tiers += [Tier(False, ((5, 0, 4, 1, 8, 3) * groups)[:groups]), Tier(False, (3,)), Tier(False, ())]
    if terms:
        tiers += [Tier(True, (4, 2, 1)[:terms]), Tier(True, (1,)), Tier(True, (8,) * terms)]
        tiers += [Tier(True, ((0, 6) * terms)[:terms])]
    return tiers


def window(code, bits):
    """Codes (n, 32) and those before them at the next bits, 7 bits in all; the last come before the first."""
    seen, lanes = torch.zeros_like(code), torch.arange(32)
    for before, shift in enumerate(range(0, 7, bits)):
        seen += code[:, (lanes - before) % 32] * 2**shift
    return seen % 128


def packed(V, H, tiers, dtype=torch.float32, basis=None, offset=None, device="cpu"):
    """A table of random codes in random tiers, and what its values are: (table, values, transform)."""
    groups = max(1, *(len(tier.bits) for tier in tiers))
    tier_of, levels = torch.randint(len(tiers), (V,)), (torch.randn(4, 128) * 3000).to(torch.int16)
    values, codes = torch.zeros(V, groups * 32, dtype=torch.float64), {}
    for index, tier in enumerate(tiers):
        rows = torch.nonzero(tier_of == index).flatten()
        codes[index] = torch.zeros(len(rows), len(tier.bits) * 32, dtype=torch.uint8)
        for group, bits in enumerate(tier.bits):
            columns = slice(group * 32, group * 32 + 32)
            code = torch.randint(2**bits, (len(rows), 32))
            codes[index][:, columns] = code.to(torch.uint8)
            uniform = code - (2**bits - 1) / 2
            own = levels[min(bits, 4) - 1, window(code, max(bits, 1))] / 4096
            values[rows, columns] = (uniform if bits > 4 else own if bits else 0 * uniform).double()
    scales = (torch.rand(V) + 0.5).to(dtype)
    table = pack(tier_of, codes, tiers, levels, scales, basis, offset, H)
    transform = torch.tensor([tier.transform for tier in tiers])[tier_of]
    return table.to(device), values.to(device), transform.to(device)


def problem(
    shape, dtype=torch.float32, device="cpu", offset=True, ids_dtype=torch.int64, tiers=None
) -> Problem:
    V, H, K, N = shape
    ids = (torch.rand(N, device=device) ** 3 * V).to(ids_dtype)  # skewed: many ids repeat
    basis = (torch.randn(K, H) / max(K, 1) ** 0.5).to(dtype) if K else None
    bias = torch.randn(H).to(dtype) if offset else None
    table, values, transform = packed(V, H, tiers or every_tier(H, K), dtype, basis, bias, device)
    tensors = [getattr(table, name) for name in TENSORS]
    return Problem(ids, tensors[:4], *tensors[4:], values, transform, H)


def small(dtype=torch.float32, device="cpu", **options) -> Problem:
    """A table of 40 rows, few enough values for finite differences."""
    tiers = [Tier(False, (3,)), Tier(False, (6,)), Tier(True, (4,)), Tier(True, (5,))]
    return problem((40, 5, 32, 11), dtype, device, tiers=tiers, **options)


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
    for shape in [*SHAPES, (500, 35, 32, 700)]:  # ... and more rows of a tier than a block of the product
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
    """All 32 rows before it count alike: sums of nibbles are at their greatest."""
    p = problem((70, 45, 32, 1), torch.float64, device, tiers=[tier])
    ids = torch.arange(70, device=device)
    assert_close(p.ours(ids, *p.factors, backend=backend), p.plain(ids, *p.factors))


def test_codes_at_the_ends_of_the_format(level):
    """Levels at the int16 limits; 8 bits at -127.5 and 127.5; padding beyond H ignored."""
    levels = torch.zeros(4, 128, dtype=torch.int16)
    levels[3, 0b1110000], levels[3, 0b0001111] = -(2**15), 2**15 - 1
    codes = {
        0: torch.tensor([[0, 15] * 16]).to(torch.uint8),
        1: torch.tensor([[0, 255] * 16]).to(torch.uint8),
    }
    tiers = [Tier(False, (4,)), Tier(False, (8,))]
    table = pack(torch.tensor([0, 1]), codes, tiers, levels, torch.ones(2), None, None, 31)
    expected = torch.tensor([[-8.0, 8 - 2**-12], [-127.5, 127.5]]).repeat(1, 16)[:, :31]
    assert torch.equal(table.decode(torch.arange(2)), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_a_row_do_not_depend_on_its_batch(level, dtype):
    p = problem((300, 210, 96, 1), dtype)
    rows = p.ours(torch.arange(300), *p.factors)
    for count in (1, 2, 5, 11, 23, 49, 97, 300):
        ids = torch.randint(0, 300, (count,))
        assert torch.equal(p.ours(ids, *p.factors), rows[ids]), count


# One token; rows of many tasks.
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.usefixtures("poisoned")
def test_scale_is_applied_before_the_one_rounding(backend, device, dtype, offset):
    p = problem((97, 97, 96, 150), dtype, device, offset)
    exact = p.plain(p.ids, *(f.double() for f in p.factors)) * 25.25
    got = p.ours(p.ids, *p.factors, scale=25.25, backend=backend)
    assert_no_worse_than(got, exact.to(dtype), exact, tiny=1e-6)  # 2x of the rounding alone


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_the_gradients_that_are_asked_for(backend, device, frozen):
    p = small(device=device)
    for position, factor in enumerate(p.factors):
        factor.requires_grad_(position != frozen)
    p.ours(p.ids, *p.factors, backend=backend).sum().backward()
    assert [f.grad is None for f in p.factors] == [position == frozen for position in range(3)]


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


def test_an_infinite_entry_of_the_basis_stays_out_of_rows_of_values(backend, device):
    p = problem((97, 97, 96, 1), device=device)
    p.basis[:, 5] = float("inf")
    rows = p.ours(torch.arange(97, device=device), *p.factors, backend=backend)
    assert rows[~p.transform].isfinite().all()
    assert not rows[p.transform][:, 5].isfinite().any()


def at_the_end(tensor: Tensor) -> Tensor:
    """Return a copy whose last byte lies before a page that may not be read."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(start + pages * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    offset = pages * mmap.PAGESIZE - size
    guarded = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return guarded.view(tensor.shape).copy_(tensor)


def guarded(p: Problem) -> Problem:
    ids, scales, basis, offset = (
        each if each is None else at_the_end(each) for each in (p.ids, p.scales, p.basis, p.offset)
    )
    return p._replace(
        ids=ids, codes=list(map(at_the_end, p.codes)), scales=scales, basis=basis, offset=offset
    )


def test_no_read_beyond_tensors_that_end_at_a_page(level):
    script = """
import sys, torch
from embkern.ops.library import cpu_capability
from tests.ops.test_gather_decode import every_tier, guarded, problem
cpu_capability(sys.argv[1])
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for H, K in ((33, 32), (97, 96)):
        for tier in every_tier(H, K):  # the last record's width decides what lies beyond it
            for N in (1, 40):
                p = problem((35, H, K, N), dtype, tiers=[tier])
                p.ids[-1] = 34
                p = guarded(p)
                p.ours(p.ids, *p.factors)
print("read nothing beyond")
"""
    run = subprocess.run([sys.executable, "-c", script, level], capture_output=True, text=True)
    assert run.stdout.strip() == "read nothing beyond", f"exit code {run.returncode}\n{run.stderr}"


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
    """A table that came from elsewhere than a checked file: no record is looked for outside the tensors."""
    p = small()
    codes = dict(zip(TENSORS, p.codes, strict=False))
    codes["tiers"] = F.pad(codes["tiers"], (0, 1))  # a second group, which neither a row nor the basis has
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
        (dict(levels=torch.zeros(4, 64, dtype=torch.int16)), ValueError, r"levels: expected shape \(4, 128"),
        (dict(levels=torch.zeros(4, 128)), TypeError, "levels: expected dtype torch.int16"),
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


@pytest.mark.parametrize("width", [0, -1, -(2**63)])
def test_rows_have_a_width(backend, device, width):
    p = small(device=device)
    with pytest.raises(ValueError, match=f"embedding_dim: expected at least 1, got {width}"):
        gather_decode(p.ids, *p.codes, p.scales, embedding_dim=width, backend=backend)


def test_another_thread_that_writes_the_table_makes_no_read_beyond_it(native):
    """Tiers, directory and ids are written while rows are decoded; the records end before a page that is not.

    A lookup reads what bounds its reads once. A table that is not right when it is read is refused.
    """
    script = """
import ctypes, mmap, threading, time, torch
from embkern.ops import gather_decode
V = 32 * 416
memory = mmap.mmap(-1, V * 4 + mmap.PAGESIZE)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert V * 4 % mmap.PAGESIZE == 0
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + V * 4), mmap.PAGESIZE, 0) == 0
records = torch.frombuffer(memory, dtype=torch.int32, count=V)  # a word, one group of one bit, for every row
directory = torch.zeros(V // 32, 5, dtype=torch.int32)
directory[:, 0] = torch.arange(V // 32) * 32
tiers, ids = torch.tensor([[0, 1]], dtype=torch.uint8), torch.arange(V - 1, -1, -1)
levels, scales = torch.zeros(4, 128, dtype=torch.int16), torch.ones(V)
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
    for shape in ((7,), (9,), (33,)):  # none of them a size of the table's own
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


def test_reference_backward_is_autograd_of_its_forward():
    p = small(torch.float64)
    grad = torch.randn(11, p.H, dtype=torch.float64)
    leaves = [f.clone().requires_grad_() for f in p.factors]
    reference.gather_decode_forward(p.ids, *p.codes, *leaves, p.H, 0.5).backward(grad)
    arguments = (grad, p.ids, *p.codes, *p.factors[:2])
    got = reference.gather_decode_backward(*arguments, 0.5, -1, True, True, True)
    assert_close(list(got), [leaf.grad for leaf in leaves])


def test_shapes_on_the_meta_device():
    p = small()
    meta = [each.to("meta") for each in (p.ids, *p.codes, *p.factors)]
    out = gather_decode(*meta, embedding_dim=p.H)
    assert out.is_meta
    assert out.shape == (11, p.H)


def test_offsets_beyond_two_to_the_31st(native):
    """A record at word 2^30; only the pages that are touched exist."""
    words = 2**30
    records = torch.empty(0, dtype=torch.int32).set_(torch.UntypedStorage((words + 2) * 4), 0, (words + 2,))
    records[-2:] = torch.tensor([1, 5])
    directory = torch.tensor([[words, 0, 0, 0, 0]], dtype=torch.int32)
    levels = (torch.arange(512).view(4, 128) % 8 * 4096).to(torch.int16)
    tiers = torch.tensor([[0, 1]], dtype=torch.uint8)
    rows = gather_decode(
        torch.tensor([0, 1]),
        records,
        directory,
        tiers,
        levels,
        torch.ones(2),
        embedding_dim=3,
        backend=native,
    )
    assert torch.equal(rows, torch.tensor([[1.0, 2, 4], [1, 2, 5]]))

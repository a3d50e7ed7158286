"""The Triton kernels of gather_decode, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from triton.runtime import interpreter

from embkern.ops import gather_decode, packed_cross_entropy, packed_logits
from embkern.ops.packed_codes import packed_levels
from embkern.ops.packed_format import PackedTensors, Tier
from embkern.triton import gather_decode as gd
from embkern.triton.launch import Launch
from embkern.triton.tiles import GroupTile, Tile
from tests.conftest import assert_no_worse_than
from tests.mapped_memory import lazy_words
from tests.ops.packed_problems import every_tier, guarded, problem, small

# (V, H, K, N): groups that fill the blocks; a basis that is not a power of two, odd rows; rows within one
# group; one token; a table without a basis.
SHAPES = [(64, 128, 128, 24), (97, 97, 96, 37), (40, 33, 32, 7), (40, 5, 32, 1), (40, 7, 0, 8)]
SCALE = 0.7


def forward(p, ids=None, scale=SCALE, **tiles):
    """Run gather_decode_forward, with the given tiles if any."""
    ids = p.ids if ids is None else ids
    packed = PackedTensors(*p.codes, p.scales, p.basis, p.offset)
    if not tiles:
        return gd.gather_decode_forward(ids, *packed, p.H, scale)
    out = p.scales.new_empty(*ids.shape, p.H)
    for launch in gd.forward_launches(ids, packed, scale, out, **tiles):
        launch.run()
    return out


def assert_contract(p, dtype, **tiles):
    got = forward(p, **tiles)
    assert got.dtype == dtype
    native = (p.plain(p.ids, *p.factors) * SCALE).to(dtype)
    exact = p.plain(p.ids, *(f.double() for f in p.factors)) * SCALE
    assert_no_worse_than(got, native, exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_forward_is_no_worse_than_plain_torch(shape, dtype):
    assert_contract(problem(shape, dtype), dtype)


# Coefficients on chip, a row in steps; all columns at once, coefficients in steps.
@pytest.mark.parametrize(
    "tiles",
    [
        dict(group_tile=GroupTile(2, 1), tile=Tile(16, 64, 128, 4, 2)),
        dict(group_tile=GroupTile(8, 1), tile=Tile(32, 16, 32, 4, 2)),
    ],
    ids=["on chip", "walked"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_every_tile_gives_the_same_rows(tiles, dtype):
    assert_contract(problem((97, 97, 96, 37), dtype), dtype, **tiles)


@pytest.mark.usefixtures("poisoned")
def test_fp64_sums_in_fp64():
    p = problem((64, 77, 64, 20), torch.float64)
    assert_close(forward(p, scale=0.1), p.plain(p.ids, *p.factors) * 0.1, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("bits", range(9))
@pytest.mark.usefixtures("poisoned")
def test_every_code_of_every_width_is_exact(bits):
    """Also in fp16, in which all values are exact."""
    tiers = [Tier(False, (bits, bits)), Tier(True, (bits,))]
    for dtype in (torch.float32, torch.float16):
        p = problem((24, 45, 32, 1), dtype, offset=False, tiers=tiers)
        p.values[:, 32:].masked_fill_(p.transform.unsqueeze(1), 0)
        p.scales.fill_(1)
        p.basis.copy_(torch.eye(32, 45))
        assert torch.equal(forward(p, torch.arange(24), 1.0), p.values[:, :45].to(dtype))


# Rings of one, two and three words; each width before and after others; steps that begin within a ring.
SHORT = [(1,), (0, 1, 0, 1), (2,), (1, 8, 2), (3, 1), (1, 3), (1, 4, 1), (8, 7, 6, 5)]
LONG = [(0, 8, 4, 2, 6, 3, 5, 1, 7), (7, 1, 5, 3, 6, 2, 4, 8, 0), (4, 4, 4, 3, 3, 3, 2, 2, 1)]


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("bits", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.usefixtures("poisoned")
def test_rings_and_sections_of_groups_in_any_order(bits, block):
    size = 32 * max(map(len, bits))
    tiers = [Tier(transform, each) for each in bits for transform in (False, True)]
    p = problem((64, size - 3, size, 1), torch.float64, tiers=tiers)
    ids = torch.arange(64)
    assert_close(forward(p, ids, 1.0, group_tile=GroupTile(block, 1)), p.plain(ids, *p.factors))


@pytest.mark.parametrize("tier", [Tier(False, (4, 8)), Tier(True, (2,))], ids=str)
def test_a_row_is_found_after_rows_of_one_tier(tier):
    """All rows before it have one tier, which makes the counts of nibbles as large as they can be."""
    p = problem((70, 45, 32, 1), torch.float64, tiers=[tier])
    ids = torch.tensor([0, 7, 8, 9, 16, 31, 32, 47, 63, 69])
    assert_close(forward(p, ids, 1.0), p.plain(ids, *p.factors))


@pytest.mark.usefixtures("poisoned")
def test_the_public_op_and_its_gradients():
    p = small(ids_dtype=torch.int32)
    leaves = [f.requires_grad_() for f in p.factors]
    ids = p.ids[:6].view(2, 3)
    out = p.ours(ids, *leaves, backend="triton")
    assert_close(out, p.plain(ids, *leaves))
    upstream = torch.randn_like(out)
    exact = torch.autograd.grad(p.plain(ids, *leaves), leaves, upstream)
    assert_close(torch.autograd.grad(out, leaves, upstream), exact)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("loss", [False, True], ids=["logits", "cross entropy"])
def test_heads_decode_with_these_kernels(loss):
    p = problem((45, 33, 32, 1))
    leaves = [f.requires_grad_() for f in (torch.randn(6, p.H), *p.factors)]
    labels = torch.randint(45, (6,))

    def ours(hidden, *factors):
        if loss:
            return packed_cross_entropy(hidden, labels, *p.codes, *factors, backend="triton")
        return packed_logits(hidden, *p.codes, *factors, backend="triton")

    def plain(hidden, *factors):
        logits = hidden @ p.plain(torch.arange(45), *factors).t()
        return F.cross_entropy(logits, labels) if loss else logits

    out, expected = ours(*leaves), plain(*leaves)
    upstream = torch.randn_like(out)
    got, exact = (torch.autograd.grad(each, leaves, upstream) for each in (out, expected))
    for each, wanted in zip((out, *got), (expected, *exact), strict=True):  # sums of terms of both signs
        assert_close(each, wanted, rtol=1e-5, atol=1e-5 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize(("H", "K"), [(33, 32), (97, 96)])
def test_no_read_beyond_tensors_that_end_at_a_page(H, K):
    """A read beyond them would end this process."""
    for tier in every_tier(H, K):
        p = problem((35, H, K, 1), tiers=[tier])
        p.ids[0] = 34
        forward(guarded(p))


def test_empty_ids_launch_nothing(monkeypatch):
    monkeypatch.setattr(Launch, "run", lambda self: pytest.fail("launched"))
    assert forward(small(), torch.empty(0, 3, dtype=torch.int32)).shape == (0, 3, 5)


def test_an_infinite_entry_of_the_basis_stays_out_of_rows_of_values():
    p = small()
    p.basis[:, 3] = float("inf")
    rows = forward(p, torch.arange(40))
    assert rows[~p.transform].isfinite().all()
    assert not rows[p.transform][:, 3].isfinite().any()


@pytest.fixture
def assertions(monkeypatch):
    """Enable the assertions of the kernels, which the interpreter skips by default."""
    options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


@pytest.mark.parametrize("bad", [-1, 40, 2**40])
@pytest.mark.usefixtures("assertions")
def test_an_id_out_of_range_is_an_assertion(bad):
    with pytest.raises(Exception, match="an id is out of range"):
        forward(small(), torch.tensor([0, bad, 3]))


@pytest.mark.parametrize("bad", [-1, 40, 2**40])
@pytest.mark.usefixtures("poisoned")
def test_an_id_out_of_range_reads_nothing(bad):
    """Until the assertion stops the kernel, other threads must not access memory outside the table."""
    p = small()
    rows = forward(p, torch.tensor([0, bad, 3]), 1.0)
    assert torch.equal(rows[1], p.offset)
    assert torch.equal(rows[[0, 2]], forward(p, torch.tensor([0, 3]), 1.0))


# Records that begin beyond or before the tensor; undefined tiers.
CORRUPT = [(0, 2**31 - 1), (0, 2**20), (0, -(2**31)), (1, -1)]


@pytest.mark.parametrize(("column", "value"), CORRUPT)
@pytest.mark.usefixtures("assertions")
def test_a_corrupt_directory_is_an_assertion(column, value):
    p = small()
    p.codes[1][1, column] = value
    forward(p, torch.tensor([0, 31]))
    with pytest.raises(Exception, match="the directory does not fit tiers and records"):
        forward(p, torch.tensor([0, 32]))


@pytest.mark.parametrize(("column", "value"), CORRUPT)
@pytest.mark.usefixtures("poisoned")
def test_a_corrupt_directory_reads_nothing(column, value):
    p = small()
    p.codes[1][1, column] = value
    rows = forward(p, torch.tensor([3, 32, 39]), 1.0)
    assert torch.equal(rows[1:], p.offset.expand(2, -1))


@pytest.mark.parametrize("words", [2**30, 2**31, 2**32 - 2])
def test_offsets_beyond_two_to_the_31st(words):
    """Records beyond 2^31 bytes and words; memory exists only for pages that are accessed."""
    few = torch.tensor([0x6B8A1C35, 0x1D2E93F7], dtype=torch.int32)
    records = lazy_words(words + 2)
    records[-2:] = few
    tiers = torch.tensor([[0, 1], [1, 1]], dtype=torch.uint8)

    def rows(records, first):
        directory = torch.tensor([[first - 2**32 if first >= 2**31 else first, 0x10, 0, 0, 0]]).int()
        codes = (records, directory, tiers, packed_levels(), torch.ones(2), torch.eye(32, 3))
        return gather_decode(torch.tensor([0, 1]), *codes, embedding_dim=3, backend="triton")

    assert torch.equal(rows(records, words), rows(few, 0))

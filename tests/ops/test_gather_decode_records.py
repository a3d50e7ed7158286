"""Records of every sequence of bits: rows by gather_decode, products with vectors by packed_logits."""

from __future__ import annotations

import functools

import pytest
import torch

from embkern.ops import gather_decode, packed_logits
from embkern.ops.library import cpu_capability
from embkern.ops.packed_format import Tier
from embkern.tables.packed import pack
from tests.conftest import assert_no_worse_than
from tests.ops.guard_pages import assert_reads_nothing_beyond
from tests.ops.packed_problems import problem, random_codes, random_levels, values_of

OP = "gather_decode"
# Kernels decode two groups of 2 to 4 bits or four of 1 bit at once, and read 6 words of the stream for that:
# runs that fill blocks, and those that end within one.
RUNS = [(bits,) * groups for bits in range(1, 5) for groups in (1, 2, 3, 4, 5, 7, 8)]
# Streams of one to three words; runs that begin in the middle of a block, and those whose last block wraps;
# groups without bits, and wider ones, between groups of the stream.
MIXED = [(1, 2, 1), (3, 1, 4), (0, 2, 0, 1), (5, 1, 2), (1, 5, 1), (2, 1), (1, 2), (4, 0, 0, 3), (1, 1, 1, 3)]
MIXED += [
    (4, 3, 2, 1),
    (1, 2, 3, 4),
    (3, 3, 3, 1, 1, 1, 1, 1, 2),
    (8, 4, 4, 4, 7, 3, 3, 6, 1, 1),
    (2, 2, 2, 4, 1),
]
WIDE = [(5,), (6, 6), (7, 0, 7), (8, 8, 8)]
SEQUENCES = RUNS + MIXED + WIDE


@functools.cache
def drawn(bits: tuple[int, ...]):
    """Codes (3, 32 G), levels and values in float64, whose definition is a slow loop."""
    tier, levels = Tier(False, bits), random_levels()
    codes = random_codes(3, tier)
    return codes, levels, values_of(codes, tier, levels)


def rows_of(bits: tuple[int, ...], H: int, transform: bool = False):
    """A table of three random records of one tier without scales, and its values (3, 32 G)."""
    codes, levels, values = drawn(bits)
    basis = torch.eye(32 * len(bits), H) if transform else None
    tiers = [Tier(transform, bits)]
    return pack(torch.zeros(3).long(), {0: codes}, tiers, levels, torch.ones(3), basis, None, H), values


def tensors(table, dtype=torch.float32):
    """The arguments of the ops, with floats of a dtype."""
    floats = (None if each is None else each.to(dtype) for each in (table.scales, table.basis, table.offset))
    return (table.records, table.directory, table.tiers, table.levels, *floats)


@pytest.mark.parametrize("cut", [0, 5, 31])
@pytest.mark.usefixtures("poisoned")
def test_rows_of_every_sequence_of_bits_are_exact(level, cut):
    assert cpu_capability() == level
    for bits in SEQUENCES:
        H = 32 * len(bits) - cut
        table, values = rows_of(bits, H)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            rows = gather_decode(torch.arange(3), *tensors(table, dtype), embedding_dim=H)
            assert torch.equal(rows, values[:, :H].to(dtype)), (bits, dtype)


@pytest.mark.usefixtures("poisoned")
def test_coefficients_of_every_sequence_of_bits_are_exact(level):
    for bits in SEQUENCES:
        table, values = rows_of(bits, 32 * len(bits), transform=True)
        for dtype in (torch.float32, torch.float64):
            rows = gather_decode(torch.arange(3), *tensors(table, dtype), embedding_dim=values.shape[1])
            assert torch.equal(rows, values.to(dtype)), (bits, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("states", [1, 2, 3, 8, 9])
def test_products_of_every_sequence_of_bits(level, dtype, states):
    for bits in SEQUENCES:
        H = 32 * len(bits) - 5
        table, values = rows_of(bits, H)
        hidden = torch.randn(states, H, dtype=dtype)
        exact = hidden.double() @ values[:, :H].t()
        got = packed_logits(hidden, *tensors(table, dtype))
        size = hidden.double().abs() @ values[:, :H].abs().t()
        assert ((got - exact).abs() <= 32 * torch.finfo(dtype).eps * size).all(), bits


def test_products_are_no_worse_than_plain_torch(level):
    p = problem((500, 290, 0, 1), offset=False, tiers=[Tier(False, each) for each in MIXED[-4:]])
    rows, hidden = p.plain(torch.arange(500), p.scales.double()), torch.randn(4, 290)
    for states in (1, 2, 4):
        own = hidden[:states]
        got = packed_logits(own, *p.codes, *p.factors)
        assert_no_worse_than(got, own @ rows.float().t(), own.double() @ rows.t())


@pytest.mark.usefixtures("native")
def test_no_read_beyond_the_last_record():
    """Every sequence of bits is that of the last record, which ends at a page without read permission."""
    assert_reads_nothing_beyond("""
import torch
from embkern.ops import gather_decode, packed_logits
from tests.ops.guard_pages import at_the_end
from tests.ops.test_gather_decode_records import SEQUENCES, rows_of, tensors
def run():
    for bits in SEQUENCES:
        table, values = rows_of(bits, 32 * len(bits))
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            records, directory, tiers, levels, *floats = tensors(table, dtype)
            arguments = (at_the_end(records), directory, at_the_end(tiers), at_the_end(levels), *floats)
            rows = gather_decode(torch.tensor([2]), *arguments, embedding_dim=values.shape[1])
            assert torch.equal(rows, values[2:].to(dtype)), bits
            for states in (1, 8, 9):
                packed_logits(torch.ones(states, values.shape[1], dtype=dtype), *arguments)
""")


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8], ids=str)
def test_the_native_op_takes_the_levels_of_the_second_edition(native, dtype):
    table, _ = rows_of((2, 3), 64)
    records, directory, tiers, levels, *floats = tensors(table)
    op = torch.ops.embkern.gather_decode_forward.native
    for wrong, shape in ((levels.to(dtype), "17, 16"), (torch.zeros(4, 128, dtype=dtype), "4, 128")):
        message = rf"levels: expected dtype int8 of shape \(17, 16\), got \w+ of shape \({shape}\)"
        with pytest.raises(ValueError, match=message):
            op(torch.tensor([0]), records, directory, tiers, wrong, *floats, 64, 1.0)

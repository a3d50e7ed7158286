"""The benchmark of codes: decoders, best paths, packed rows, the picture."""

from __future__ import annotations

import ctypes
import itertools
import re

import pytest
import torch

from benchmarks.codes.compiler import available_sets, compiled, is_x86
from benchmarks.codes.cycles import measure_decoders
from benchmarks.codes.picture import DECODERS, draw
from benchmarks.codes.sums import ROW, SUMS_4096, packed_entries, trellis_of_sums
from benchmarks.codes.trellis import Trellis, normal_samples
from benchmarks.tools import packed_levels as packed_levels_tool
from embkern.methods.quantizer_levels import TRELLIS_DISTORTION
from embkern.ops.packed_codes import levels_of_windows, packed_levels

pytestmark = pytest.mark.slow  # compiles
needs_sets = pytest.mark.skipif(not is_x86() or not available_sets(), reason="the decoders are for AVX2")


@needs_sets
def test_decoders_find_the_values_of_a_plain_loop():
    rows = measure_decoders(repeats=1, seed=3)
    assert {row["set"] for row in rows} == set(available_sets())
    assert all(row["right"] for row in rows)
    assert all(row["cycles"] > 0 for row in rows)
    assert {row["decoder"] for row in rows} <= set(DECODERS)


@pytest.mark.parametrize(("bits", "coded"), [(1, 0), (2, 0), (3, 2)])
def test_paths_are_the_best_of_their_ring(bits, coded):
    """Of all rings with the same register at the end, none is nearer."""
    trellis = Trellis(bits, 4, ring=4, coded=coded)
    levels = trellis.random_levels(0)
    samples = normal_samples(4, 24, 1)
    states = trellis.states(samples, levels)
    shift, registers = coded or bits, states % 16
    codes = torch.tensor(list(itertools.product(range(2**shift), repeat=4)))
    rings = torch.zeros_like(codes)
    for before in range(4):
        rings += codes.roll(before, 1) << (before * shift)
    rings %= 16
    for x, own, ends in zip(samples, states, registers, strict=True):
        assert any(torch.equal(ends, ring) for ring in rings)
        of_all = levels[0].view(-1, 16)[:, rings]  # further bits, rings, values
        errors = (of_all - x).square().amin(0).sum(1)[rings[:, -1] == ends[-1]]
        assert torch.isclose((levels[0, own] - x).square().sum(), errors.min())


def packed_rows(states, bits):
    """Rows of bytes, and the state (N, 640) of every value; steps run from the last place of a row down."""
    values = torch.arange(ROW)
    quarter = values % 16 // 4
    states = states.flip(1)
    planes = [torch.stack([states & 1, states >> 1 & 1], 2).flatten(1)]
    position = quarter * 16 + values % 64 // 16 * 4 + values % 4
    if bits == 1:
        window = values // 32 * 16 + values % 16  # two values follow from it
        place = window // 16 * 16 + window % 4 * 4 + window % 16 // 4
    else:
        place = values // 16 * 16 + values % 4 * 4 + quarter
    own = states[:, place]
    if bits == 3:
        planes.append(torch.zeros_like(own).index_copy_(1, values // 64 * 64 + position, own >> 12 & 1))
    if bits == 4:
        bit = values // 64 * 128 + position % 16 * 8 + position // 16 * 2
        further = torch.zeros(len(states), 2 * ROW, dtype=torch.int64)
        planes.append(further.index_copy_(1, bit, own >> 12 & 1).index_copy_(1, bit + 1, own >> 13 & 1))
    found = torch.cat(planes, 1).view(len(states), -1, 8)
    return (found << torch.arange(8)).sum(2).to(torch.uint8), own


@needs_sets
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_sums_are_decoded_to_the_levels_of_their_paths(bits):
    """What the rates are measured with is what the decoders read, at every instruction set."""
    sums, trellis = SUMS_4096[bits], trellis_of_sums(bits)
    entries = torch.randint(-25, 26, (trellis.values, sum(sums.sizes))).float()
    levels = sums.levels(entries, trellis.memory)
    samples = 30 * normal_samples(ROW, 5 * ROW, 2)
    rows, own = packed_rows(trellis.states(samples, levels), bits)
    which = torch.arange(ROW) // 16 % 2 if bits == 1 else torch.zeros(ROW, dtype=torch.int64)
    tables = torch.zeros(96, dtype=torch.int8)
    tables[: entries.numel()] = entries.flatten().to(torch.int8)
    for flags in available_sets().values():
        out = torch.full((len(rows), ROW), torch.nan)
        pointers = [ctypes.c_void_p(each.data_ptr()) for each in (tables, rows, out)]
        library = compiled("measure.cpp", flags)
        library.decode_sums(bits, *pointers[:2], ctypes.c_int64(len(rows)), pointers[2])
        assert torch.equal(out, levels[which, own])


def test_tables_of_whole_numbers_have_sums_of_bytes():
    sums, trellis = SUMS_4096[2], trellis_of_sums(2)
    entries = 15 * torch.randn(1, sum(sums.sizes)).clamp(-2.5, 2.5)
    whole = sums.whole(entries, trellis.memory)
    assert torch.equal(whole, whole.round())
    exact = sums.levels(entries, trellis.memory)
    assert (sums.levels(whole, trellis.memory) - exact).abs().max() <= 1.5 + 1e-4
    assert sums.levels(sums.whole(2 * entries, trellis.memory), trellis.memory).abs().max() == 127


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_sums_of_packed_tables_are_their_levels(bits):
    sums, memory = SUMS_4096[bits], trellis_of_sums(bits).memory
    levels = sums.levels(packed_entries(bits), memory) / 32
    expected = levels_of_windows(packed_levels())[bits - 1]
    assert torch.equal(levels, expected if bits == 1 else expected.flatten().unsqueeze(0))


@needs_sets
def test_levels_are_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packed_levels_tool, "SAMPLES", 6400)
    packed_levels_tool.main(["--starts", "3", "--output", str(tmp_path / "levels.txt")])
    rows = [line.split() for line in (tmp_path / "levels.txt").read_text().splitlines() if line[0] != "#"]
    assert [len(row) for row in rows] == [16] * 17
    printed = re.findall(r"bits: error ([0-9.]+),", capsys.readouterr().out)
    for error, expected in zip(printed, TRELLIS_DISTORTION[1:], strict=True):
        assert float(error) == pytest.approx(expected, rel=0.15)


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {"kind": "rate", "code": "sums-4096", "bits": 2, "ring": ROW, "decibels": 11.3},
        {"kind": "cycles", "decoder": "sums-4096", "bits": 2, "set": "avx512", "cycles": 6.0}
        | {"cycles_of_integers": 4.0},
        {"kind": "cycles", "decoder": "planes", "bits": 3, "set": "avx2", "cycles": 40.0}
        | {"cycles_of_integers": None},
    ]
    path = draw(rows, tmp_path / "codes.png")
    assert path.read_bytes()[:4] == b"\x89PNG"

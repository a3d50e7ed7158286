"""Rate allocation: budgets, floors, weights, and tables of every shape."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from embkern.io.mapped_table import TableFile
from embkern.methods import allocate, svd, table_rows
from embkern.methods.base import row_weights
from embkern.methods.quantizer_levels import distortion
from embkern.methods.row_codes import scalar_levels
from embkern.methods.table_rows import BLOCK_ROWS
from embkern.tables.packed import PackedTable
from tests.conftest import seed_of


def _table(V: int = 2000, H: int = 96, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return rows with a decaying spectrum, like embeddings, and norms between 0.5 and 1.5."""
    generator = torch.Generator().manual_seed(seed_of(seed))
    rotation = torch.linalg.qr(torch.randn(H, H, generator=generator))[0]
    spectrum = torch.arange(1, H + 1).float().pow(-0.7)
    norms = torch.rand(V, 1, generator=generator) + 0.5
    return (torch.randn(V, H, generator=generator) * spectrum @ rotation * norms).to(dtype)


def _zipf(V: int) -> torch.Tensor:
    return 1 / torch.arange(1, V + 1, dtype=torch.float64)


def _dense(packed: PackedTable) -> torch.Tensor:
    return packed.to(torch.float64).to_dense()


def _errors(table: torch.Tensor, packed: PackedTable) -> torch.Tensor:
    return 1 - F.cosine_similarity(table.double(), _dense(packed), eps=1e-30)


def test_the_levels_are_those_of_lloyd_and_max() -> None:
    generator = torch.Generator().manual_seed(seed_of(0))
    sample = torch.randn(2**20, generator=generator, dtype=torch.float64)
    for bits in range(1, 5):
        levels = scalar_levels()[bits - 1, : 2**bits].double() / 4096
        nearest = levels[torch.bucketize(sample, (levels[1:] + levels[:-1]) / 2)]
        assert (sample - nearest).square().mean().item() == pytest.approx(distortion(bits), rel=0.01)
        for level in levels:  # each level is the mean of the values nearest to it
            assert sample[nearest == level].mean().item() == pytest.approx(level.item(), abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", [5.0, 8.0, 16.0])
def test_the_budget_is_met_and_never_exceeded(ratio, dtype) -> None:
    table = _table(dtype=dtype)
    ratio = ratio / (4 / table.element_size())
    packed = allocate(table, ratio=ratio, counts=_zipf(len(table)))
    assert packed.nbytes <= table.nbytes / ratio
    assert packed.nbytes >= 0.99 * table.nbytes / ratio
    assert packed.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)


def test_rows_that_are_read_often_keep_their_direction() -> None:
    table, counts = _table(), _zipf(2000)
    packed = allocate(table, ratio=12, counts=counts)
    error, uniform = _errors(table, packed), _errors(table, allocate(table, ratio=12))
    weights = row_weights(counts, 2000, 0.5)
    assert error[:20].mean() < 0.2 * error[1000:].mean()
    assert (weights * error).sum() < 0.85 * (weights * uniform).sum()
    assert uniform.mean() < error.mean()


def test_it_beats_low_rank_and_gives_more_for_more_bytes() -> None:
    table = _table()
    errors = [_errors(table, allocate(table, ratio=ratio)).mean() for ratio in (6, 10, 16)]
    assert errors[0] < errors[1] < errors[2]
    rank = int(table.numel() / 16 / sum(table.shape))
    assert errors[2] < 0.6 * (1 - F.cosine_similarity(table, svd(table, rank).to_dense())).mean()


def test_a_higher_exponent_favours_frequent_rows_and_fewer_tiers_cost_little() -> None:
    table, counts = _table(), _zipf(2000)
    p = counts / counts.sum()
    read = {
        a: float((p * _errors(table, allocate(table, ratio=12, counts=counts, exponent=a))).sum())
        for a in (0.0, 0.5, 1.0)
    }
    assert read[1.0] < read[0.5] < read[0.0]
    weights = row_weights(counts, 2000, 0.5)
    all_tiers, six, one = (
        float((weights * _errors(table, allocate(table, ratio=12, counts=counts, tiers=tiers))).sum())
        for tiers in (16, 6, 1)
    )
    assert all_tiers <= six * 1.01 <= one * 1.01
    assert six < 1.1 * all_tiers < 0.9 * one


def test_the_floor_holds_for_every_row_and_one_too_high_is_refused() -> None:
    table, counts = _table(), _zipf(2000)
    free = float(_errors(table, allocate(table, ratio=12, counts=counts, exponent=1)).max())
    floor = round(1 - 0.8 * free, 3)
    packed = allocate(table, ratio=12, counts=counts, exponent=1, floor=floor)
    assert _errors(table, packed).max() <= 1 - floor + 1e-3
    assert packed.nbytes <= table.nbytes / 12
    with pytest.raises(
        ValueError, match=f"ratio: 30 .* with floor {floor}; the highest that fits is"
    ) as error:
        allocate(table, ratio=30, counts=counts, floor=floor)
    highest = float(str(error.value).rpartition(" ")[2])
    assert 12 < highest < 30
    with pytest.raises(ValueError, match="floor: expected at most 0.99"):
        allocate(table, ratio=12, counts=counts, floor=0.999999)


@pytest.mark.parametrize("speed", [0.3, 0.9, 1.0])
def test_speed_is_the_least_share_of_lookups_without_a_product(speed) -> None:
    table, counts = _table(), _zipf(2000)
    packed = allocate(table, ratio=12, counts=counts, speed=speed)
    assert packed.nbytes <= table.nbytes / 12
    values = packed.tiers[packed.tier_of_rows(), 0] == 0
    assert counts[values].sum() / counts.sum() >= speed - 1e-12
    assert (packed.basis is None) == bool(values.all())
    if speed == 1:
        assert values.all()


def test_speed_has_its_price_in_ratio_and_quality() -> None:
    table, counts = _table(8000), _zipf(8000)
    found = [allocate(table, ratio=16, counts=counts, speed=speed) for speed in (0.0, 1.0)]
    weights = counts**0.55
    free, fast = (float((weights * _errors(table, packed)).sum()) for packed in found)
    assert fast > free  # Rare rows take at least a bit a value, which frequent ones lack.
    with pytest.raises(ValueError, match=r"ratio: 30 .* with speed 1; the highest that fits is"):
        allocate(table, ratio=30, counts=counts, speed=1)
    assert allocate(table, ratio=30, counts=counts).nbytes <= table.nbytes / 30


def test_the_highest_ratio_is_named_and_fits() -> None:
    table = _table(300, 96)
    with pytest.raises(ValueError, match="ratio: 1000 leaves no room .* highest that fits is") as error:
        allocate(table, ratio=1000)
    highest = float(str(error.value).rpartition(" ")[2])
    packed = allocate(table, ratio=highest)
    assert packed.nbytes <= table.nbytes / highest


def test_the_same_inputs_give_the_same_bytes() -> None:
    table, counts = _table(), _zipf(2000)
    first, second = (allocate(table, ratio=16, counts=counts) for _ in range(2))
    assert first.nbytes == second.nbytes
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name


@pytest.mark.parametrize(
    ("V", "H", "ratio"), [(1, 384, 1.25), (7, 384, 2), (33, 120, 2), (500, 40, 2), (300, 97, 2)]
)
def test_tables_of_any_shape(V, H, ratio) -> None:
    table = _table(V, H, seed=V)
    packed = allocate(table, ratio=ratio)  # the levels alone take a kilobyte
    assert packed.nbytes <= table.nbytes / ratio
    assert packed.to_dense().shape == (V, H)
    assert _errors(table, packed).mean() < 0.1


def test_rows_of_signs_are_estimated_with_trellis_codes() -> None:
    """Scalar codes of 1 bit have no error on signs, but trellis codes, which are stored, do."""
    table = torch.randn(600, 96).sign()
    assert _errors(table, allocate(table, ratio=12)).mean() < 0.06  # 0.16 at 1 bit, 0.04 at 2


def test_tables_share_no_memory() -> None:
    first, second = (allocate(_table(), ratio=8) for _ in range(2))
    for name, tensor in first.tensors().items():
        assert tensor.data_ptr() != second.tensors()[name].data_ptr(), name


def test_a_table_too_small_to_be_made_smaller_is_refused() -> None:
    with pytest.raises(
        ValueError, match="the highest that fits is 0.[0-9]+, so it cannot be made smaller by this method"
    ):
        allocate(_table(7, 7), ratio=1)


def test_equal_rows_zero_rows_and_extreme_norms() -> None:
    equal = torch.randn(1, 64).repeat(500, 1)
    packed = allocate(equal, ratio=8)
    assert packed.nbytes <= equal.nbytes / 8
    assert _errors(equal, packed).max() < 0.2
    table = _table(500, 64)
    table[::7] = 0
    dense = _dense(allocate(table, ratio=8))
    assert not dense[::7].any()
    assert dense[1::7].any()
    tiny, huge = (_table(500, 64) * factor for factor in (1e-18, 1e15))
    for each in (tiny, huge):
        packed = allocate(each, ratio=4)
        assert packed.dtype == torch.float32
        assert packed.nbytes <= each.nbytes / 4
        assert torch.isfinite(_dense(packed)).all()
        assert _errors(each, packed).mean() < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.5}, "ratio: expected at least 1"),
        ({"ratio": math.nan}, "ratio: expected at least 1"),
        ({"ratio": 8, "counts": torch.ones(3)}, r"counts: expected shape \(2000,\), .*got \(3,\)"),
        ({"ratio": 8, "counts": -torch.ones(2000)}, "counts: expected finite values of at least 0, got -1"),
        ({"ratio": 8, "counts": torch.zeros(2000)}, "counts: expected one above 0, got none"),
        ({"ratio": 8, "exponent": 2}, "exponent: .* got 2"),
        ({"ratio": 8, "tiers": 17}, "tiers: .* got 17"),
        ({"ratio": 8, "rank": 3}, "rank"),
    ],
)
def test_wrong_arguments_are_named(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        allocate(_table(), **options)


def test_rows_that_are_not_finite_are_named() -> None:
    table = _table()
    table[17, 3] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity in 1 row.*17"):
        allocate(table, ratio=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_table_in_a_file_gives_the_same_bytes(tmp_path, dtype) -> None:
    table = _table(BLOCK_ROWS + 700, 48, dtype=dtype)  # more than a block
    save_file({"t": table}, tmp_path / "t")
    counts = _zipf(len(table))
    expected = allocate(table, ratio=6, counts=counts).tensors()
    found = allocate(TableFile(tmp_path / "t", "t"), ratio=6, counts=counts).tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], each) for name, each in expected.items())


def test_rows_do_not_depend_on_the_block_that_they_are_in(monkeypatch) -> None:
    """The codes of a block are laid out among those of the others, at the places of its rows."""
    table, counts = _table(300, 64), _zipf(300)
    expected = _errors(table, allocate(table, ratio=4, counts=counts))
    monkeypatch.setattr(table_rows, "BLOCK_ROWS", 64)
    found = _errors(table, allocate(table, ratio=4, counts=counts))
    assert float(found.mean()) == pytest.approx(float(expected.mean()), rel=0.02)
    assert found.max() < 2 * expected.max()


RESIDENT = """
import resource, sys
from embkern.io.mapped_table import TableFile
from embkern.methods import allocate
allocate(TableFile(sys.argv[1], "small"), ratio=16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
allocate(TableFile(sys.argv[1], "t"), ratio=16)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_a_table_in_a_file_is_never_whole_in_memory(tmp_path) -> None:
    table = torch.randn(40_000, 768)  # 123 MB
    save_file({"t": table, "small": table[: 2 * BLOCK_ROWS].clone()}, tmp_path / "t")
    command = [sys.executable, "-c", RESIDENT, str(tmp_path / "t")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < table.nbytes / 2


PEAK = """
import resource, sys, torch
from embkern.io.mapped_table import TableFile
from embkern.methods import allocate
torch.set_num_threads(1)  # every thread has scratch memory of its own
table = TableFile(sys.argv[1], "t")
counts = 1 / torch.arange(1, len(table) + 1, dtype=torch.float64)
packed = allocate(table, ratio=16, counts=counts)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - packed.nbytes - counts.nbytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_memory_grows_by_some_bytes_a_row(tmp_path) -> None:
    """The costs of 10 tiers take 80 bytes a row, and the table itself, of which no copy is made, 256."""
    rows, peaks = (30_000, 120_000), []
    for V in rows:
        save_file({"t": _table(V, 64)}, tmp_path / "t")
        command = [sys.executable, "-c", PEAK, str(tmp_path / "t")]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert (peaks[1] - peaks[0]) / (rows[1] - rows[0]) < 250

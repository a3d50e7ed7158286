"""Ahead-of-time compilation for A100, H100 and B200: no spills, shared memory fits, tensor cores in use."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")


from embkern.ops.reference import MEAN, NONE
from embkern.triton import aot
from embkern.triton import launch as launching
from embkern.triton.aot import LossShape, Shape, launches
from embkern.triton.tiles import FEW_POSITIONS, REPRESENTATIVE, TILES, Device, shared_estimate, tile_of
from tests.triton.launching import assert_specialised_as_at_run_time

pytestmark = pytest.mark.slow

MULTIPLIES = ("_gather_project_kernel", "_project_grad_kernel", "_grad_basis_kernel")
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
ALIGNED, UNALIGNED, FULL = (
    Shape(16384, 256, 2048),
    Shape(16384, 75, 768),
    Shape(16384, 75, 768, torch.float32),
)
APART = Shape(16384, 75, 768, apart=5)  # rows of 75 codes that start on 16 bytes
# On an A100 codes of rank 299 leave room for 64 rows, elsewhere for 128.
WIDE = Shape(16384, 299, 768, apart=5)
FEW = Shape(4, 75, 768)
CASES = [(capability, shape) for shape in (APART, WIDE) for capability in REPRESENTATIVE]
CASES += [(80, ALIGNED), (80, FULL), (90, ALIGNED), (90, UNALIGNED), (100, ALIGNED), (100, UNALIGNED)]
# Cases with other paths in the source are compiled for one architecture: decoding, ranks in steps with int32
# ids and odd columns, fp64.
CASES += [(90, FEW), (90, Shape(16384, 640, 77, torch.float16, torch.int32)), (90, Shape(4, 640, 2048))]
CASES += [(90, Shape(16384, 75, 768, torch.float64))]
TERMS = (0.5, 1.0, 0.25, 0.0025)
# The loss of training, in the widths of small, base and large models; then with every option: the root of the
# batch, known norms and both gradients in fp32, the roots of the rows in fp64.
LOSSES = [
    (90, LossShape(30522, H, dtype)) for H in (384, 768, 4096) for dtype in (torch.float32, torch.bfloat16)
]
LOSSES += [
    (capability, LossShape(30522, 768, dtype))
    for capability in (80, 100)
    for dtype in (torch.float32, torch.bfloat16)
]
EVERYTHING = LossShape(30522, 768, torch.float32, TERMS, 0.5, MEAN, everything=True)
ROWS = LossShape(30522, 768, torch.float64, TERMS, 0.5, NONE, everything=True)
LOSSES += [(capability, EVERYTHING) for capability in REPRESENTATIVE] + [(90, ROWS)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        return aot.reports([*CASES, *LOSSES])


def test_every_kernel_is_compiled_for_every_architecture(rows):
    for capability in REPRESENTATIVE:
        names = {row.kernel for row in rows if row.capability == capability}
        for shape, count in ((ALIGNED, 6), (EVERYTHING, 4)):
            expected = {launch.kernel.__name__ for launch in launches(shape, REPRESENTATIVE[90])}
            assert len(expected) == count
            assert names >= expected


def test_no_kernel_spills_or_exceeds_shared_memory(rows):
    for row in rows:
        assert row.spills == 0, row
        assert row.stack_bytes == 0, row
        assert row.shared_bytes <= row.shared_limit, row


def test_products_run_on_the_tensor_cores_of_their_architecture(rows):
    for row in rows:
        if row.kernel in MULTIPLIES and row.shape in map(str, (ALIGNED, UNALIGNED)):
            assert row.tensor_core == TENSOR_CORE[row.capability], row
    (decode,) = (row for row in rows if row.kernel == MULTIPLIES[0] and row.shape == str(FEW))
    assert decode.tensor_core == "HMMA", "16 rows are too few for wgmma, not for mma.sync"


def test_fp32_is_never_cut_to_tf32(rows):
    full = [row for row in rows if row.shape == str(FULL) and row.kernel in MULTIPLIES]
    assert len(full) == 3
    assert not any(row.tensor_core for row in full)


def test_aligned_rows_are_gathered_16_bytes_at_a_time_and_the_operands_prefetched(rows):
    for row in rows:
        if row.kernel in MULTIPLIES and row.shape == str(ALIGNED):
            assert row.wide_loads >= 16, row
            assert row.async_copies >= 16, row


def test_rows_of_any_rank_that_start_on_16_bytes_are_gathered_16_bytes_at_a_time(rows):
    gathering = [row for row in rows if row.kernel in (MULTIPLIES[0], MULTIPLIES[2])]
    for capability in REPRESENTATIVE:
        of_capability = [row for row in gathering if row.capability == capability]
        for row in (row for row in of_capability if row.shape == str(APART)):
            (unaligned,) = (
                other
                for other in gathering
                if (other.kernel, other.shape) == (row.kernel, str(UNALIGNED))
                if other.capability == max(capability, 90)
            )
            assert row.wide_loads >= unaligned.wide_loads + 4, (row, unaligned)


def test_the_rows_of_the_loss_are_loaded_16_bytes_at_a_time_into_registers(rows):
    """Each element of output and target is loaded once; a load of a warp is 32 lanes of 16 bytes."""
    for row in rows:
        if row.kernel == "_cosine_mse_kernel" and " 1,1,0,0 " in row.shape:
            H = int(row.shape.split("H=")[1].split()[0])
            itemsize = 2 if row.shape.endswith("bfloat16") else 4
            warps = int(row.tile.split("warps=")[1].split()[0])
            assert row.wide_loads == 2 * -(-H * itemsize // (warps * 32 * 16)), row


@pytest.mark.parametrize(
    "shape", [ALIGNED, Shape(4, 75, 77, torch.float16, torch.int32), EVERYTHING, ROWS], ids=str
)
def test_a_launch_compiles_as_triton_itself_would(shape):
    assert_specialised_as_at_run_time(launches(shape, REPRESENTATIVE[90]))


def test_the_report_is_printed_and_written(tmp_path, monkeypatch, capsys, rows):
    monkeypatch.setattr(aot, "reports", lambda cases: rows)
    with pytest.raises(SystemExit) as ended:
        aot.main(["--json", str(tmp_path / "aot.json")])
    assert ended.value.code == 0
    assert "0 that spill" in capsys.readouterr().out
    written = json.loads((tmp_path / "aot.json").read_text())["rows"]
    assert [each["kernel"] for each in written] == [row.kernel for row in rows]


def test_a_kernel_that_spills_fails_the_report(monkeypatch):
    bad = aot.Report("k", 80, "", "", 255, 4, 0, 0, 1, "", 0, 0)
    monkeypatch.setattr(aot, "reports", lambda cases: [bad])
    with pytest.raises(SystemExit) as ended:
        aot.main([])
    assert ended.value.code == 1


# 9.9 and 7.5 have less shared memory than the devices that the tiles were chosen for.
@pytest.mark.parametrize(
    "device", [*REPRESENTATIVE.values(), Device(99, 60, 99 << 10), Device(75, 40, 64 << 10)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_shape_has_a_tile_that_fits_the_device(device, dtype):
    for kernel in {name for name, _ in TILES}:
        for N in (FEW_POSITIONS, FEW_POSITIONS + 1):
            for r in (1, 16, 75, 128, 129, 257, 299, 512, 513, 5000):
                for H in (768, 77):
                    tile = tile_of(kernel, device, dtype, N, r, H)
                    assert shared_estimate(kernel, tile, r, dtype.itemsize) <= device.shared_bytes
                    assert all(block >= 16 and block & (block - 1) == 0 for block in tile.blocks().values())


@pytest.mark.parametrize(
    ("r", "blocks"),
    [(75, (64, 16)), (299, (256, 64)), (256, (256, 0)), (200, (256, 0)), (257, (256, 16)), (5, (16, 0))],
)
def test_two_powers_of_two_hold_a_rank(r, blocks):
    tile = tile_of("forward", REPRESENTATIVE[90], torch.bfloat16, 16384, r, 768)
    assert blocks == (tile.BLOCK_R, tile.BLOCK_TAIL)


def test_importing_the_launchers_needs_no_device():
    modules = "embkern.triton.gather_project, embkern.triton.cosine_mse"
    code = f"import torch, {modules}; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("num_warps", "registers"), [(1, 255), (4, 255), (8, 255), (16, 128)])
def test_registers_are_bounded_by_what_a_program_can_have(monkeypatch, num_warps, registers):
    """As with Triton 3.6: a program of more than 65536 registers would not launch."""
    monkeypatch.setattr(launching, "_BOUND_REGISTERS", True)
    bounded = launching.Launch(None, (1,), {}, num_warps)
    assert bounded.options["maxnreg"] == registers
    assert 32 * num_warps * registers <= 65536

"""Ahead-of-time compilation of gather_decode's kernels: none spills, 16-bit products take tensor cores."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")


from embkern.triton import aot
from embkern.triton.aot import PackedShape, launches
from embkern.triton.tiles import REPRESENTATIVE
from tests.triton.launching import assert_specialised_as_at_run_time
from tests.triton.test_aot import TENSOR_CORE

pytestmark = pytest.mark.slow

BASE, FULL = PackedShape(16384, 128, 768, torch.bfloat16), PackedShape(16384, 128, 768)
WALKED, ODD = PackedShape(16384, 640, 2048, torch.bfloat16), PackedShape(16384, 96, 97, torch.float16)
# Each architecture with the table of a base model in bf16 and with odd rows, whose loads take the most
# registers; fp32, decoding, a basis in steps and fp64 on one.
CASES = [(capability, shape) for capability in REPRESENTATIVE for shape in (BASE, ODD)]
CASES += [(90, FULL), (90, WALKED), (90, PackedShape(4, 128, 768, torch.bfloat16, torch.int32))]
CASES += [(90, PackedShape(16384, 96, 97)), (80, PackedShape(16384, 96, 97, torch.float64))]
CASES += [(90, PackedShape(4096, 96, 384))]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        return aot.reports(CASES)


def test_every_kernel_compiles_without_spills(rows):
    for capability in REPRESENTATIVE:
        names = {row.kernel for row in rows if row.capability == capability}
        assert names == {"_rows_kernel", "_gather_project_kernel"}
    for row in rows:
        assert row.spills == 0, row
        assert row.stack_bytes == 0, row
        assert row.shared_bytes <= row.shared_limit, row


def test_products_of_16_bits_run_on_tensor_cores_and_fp32_is_not_cut_to_tf32(rows):
    products = [row for row in rows if row.kernel == "_gather_project_kernel"]
    assert len(products) == len(CASES)
    for row in products:
        if row.shape in (str(BASE), str(WALKED)):
            assert row.tensor_core == TENSOR_CORE[row.capability], row
            assert row.async_copies, "the basis is prefetched"
        elif row.shape.endswith("float32"):
            assert not row.tensor_core, row


def test_a_row_needs_no_shared_memory_but_for_the_order_of_its_columns(rows):
    """It does not limit occupancy: a multiprocessor runs 32 programs, and an A100 has 163 KiB."""
    for row in rows:
        if row.kernel == "_rows_kernel":
            assert row.shared_bytes <= 4096, row


def test_a_table_without_a_basis_is_one_launch():
    (launch,) = launches(PackedShape(16384, 0, 768), REPRESENTATIVE[90])
    assert launch.kernel.__name__ == "_rows_kernel"


@pytest.mark.parametrize("shape", [BASE, PackedShape(4, 96, 97, torch.float64, torch.int32)], ids=str)
def test_a_launch_compiles_as_triton_itself_would(shape):
    assert_specialised_as_at_run_time(launches(shape, REPRESENTATIVE[90]))

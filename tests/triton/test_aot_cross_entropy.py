"""Ahead-of-time compilation of the cross-entropy kernels: none spills, 16-bit products take tensor cores."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")


from embkern.triton import aot
from embkern.triton.aot import launches
from embkern.triton.cross_entropy.shapes import HeadShape
from embkern.triton.tiles import REPRESENTATIVE
from tests.triton.launching import assert_specialised_as_at_run_time
from tests.triton.test_aot import TENSOR_CORE

pytestmark = pytest.mark.slow

NARROW, WIDE, ODD = HeadShape(8192, 128), HeadShape(8192, 768), HeadShape(8192, 75)
# Each architecture with every option, which takes the most registers, at a rank of factors, at the width of
# decoded rows, and at rows that do not start on 16 bytes; the widest fused rank, other dtypes, few states.
CASES = [(capability, shape) for capability in REPRESENTATIVE for shape in (NARROW, WIDE, ODD)]
CASES += [(capability, HeadShape(7, 768)) for capability in REPRESENTATIVE] + [(90, HeadShape(7, 128))]
CASES += [(90, HeadShape(8192, 256)), (90, HeadShape(8192, 128, everything=False))]
CASES += [(90, HeadShape(8192, 128, dtype=torch.float32)), (80, HeadShape(8192, 128, dtype=torch.float64))]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        return aot.reports(CASES)


def test_every_kernel_compiles_without_spills(rows):
    for capability in REPRESENTATIVE:
        names = {row.kernel for row in rows if row.capability == capability}
        assert names == {"_fold_kernel", "_logit_gradients_kernel", "_gradient_kernel"}
    for row in rows:
        assert row.spills == 0, row
        assert row.stack_bytes == 0, row
        assert row.shared_bytes <= row.shared_limit, row


def test_products_of_16_bits_run_on_tensor_cores_and_fp32_is_not_cut_to_tf32(rows):
    for row in rows:
        if row.shape in (str(NARROW), str(WIDE)):
            assert row.tensor_core == TENSOR_CORE[row.capability], row
        elif row.shape.endswith("float32"):
            assert not row.tensor_core, row


@pytest.mark.parametrize(
    "shape", [NARROW, HeadShape(4, 75, dtype=torch.float64), HeadShape(9, 16, everything=False)], ids=str
)
def test_a_launch_compiles_as_triton_itself_would(shape):
    assert_specialised_as_at_run_time(launches(shape, REPRESENTATIVE[90]))

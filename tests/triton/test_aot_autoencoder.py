"""Ahead-of-time compilation of autoencoder_loss's kernels: none spills, fp32 is never cut to TF32."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from embkern.triton import aot
from embkern.triton.aot import AutoencoderShape, autoencoder_launches

pytestmark = pytest.mark.slow

FULL, ODD = AutoencoderShape(30522, 75, 768), AutoencoderShape(30522, 63, 77)
# Each architecture with the table of the paper; odd rows, whose loads take the most registers, and the other
# dtypes on one.
CASES = [(80, FULL), (90, FULL), (100, FULL), (80, ODD), (90, AutoencoderShape(30522, 299, 768, bare=True))]
CASES += [(90, AutoencoderShape(128256, 256, 2048, torch.bfloat16))]
CASES += [(80, AutoencoderShape(30522, 63, 77, torch.float64))]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        return aot.reports(CASES)


def test_every_kernel_compiles_without_spills(rows):
    names = {launch.kernel.__name__ for launch in autoencoder_launches(FULL)}
    assert len(names) == 6
    for capability in (80, 90, 100):
        assert names == {row.kernel for row in rows if row.capability == capability}
    for row in rows:
        assert row.spills == 0, row
        assert row.stack_bytes == 0, row
        assert row.shared_bytes <= row.shared_limit, row


def test_sums_that_replace_cancelled_ones_are_not_cut_to_tf32(rows):
    sums = [row for row in rows if row.kernel == "_row_losses_kernel" and "float64" not in row.shape]
    assert len(sums) >= 5
    assert not any(row.tensor_core for row in sums)


def test_fp16_has_no_gram_form():
    names = {
        launch.kernel.__name__ for launch in autoencoder_launches(AutoencoderShape(9, 2, 8, torch.float16))
    }
    assert names == {"_finish_kernel", "_rows_kernel", "_cosine_mse_kernel"}

"""What benchmarks ask of the machine."""

import sys

import pytest
import torch

from benchmarks.machine import peak_bytes, resident_bytes

pytestmark = pytest.mark.slow


def test_peak_bytes_counts_result_and_scratch():
    if peak_bytes(lambda: None, "cpu") is None:
        pytest.skip("the peak of the resident set cannot be set back here")
    megabyte = 2**20
    got = peak_bytes(lambda: torch.ones(16 * megabyte) + 1, "cpu")
    assert got == pytest.approx(2 * 64 * megabyte, rel=0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set is read on Linux only")
def test_resident_bytes_rise_by_what_is_written():
    before = resident_bytes()
    written = torch.ones(2**26)  # 256 MiB: what the system reclaims meanwhile is a small part
    assert resident_bytes() - before == pytest.approx(written.nbytes, rel=0.25)

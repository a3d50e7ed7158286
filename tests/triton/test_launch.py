"""Launch.run: Triton's launcher at the first call for a key, after it the compiled kernel itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from embkern.triton import launch as launching
from embkern.triton.gather_project.forward import _gather_project_kernel, forward_launch
from embkern.triton.tiles import REPRESENTATIVE

pytestmark = pytest.mark.slow  # it compiles
DEVICE = REPRESENTATIVE[90]


class FakeDriver:
    """A driver that compiles for an H100, and notes launches in place of enqueueing them."""

    def __init__(self) -> None:
        self.launched: list[tuple] = []
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, len(self.launched), 32, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": DEVICE.shared_bytes},
        )

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            self.launched.append(((x, y, z), stream, source.hash(), arguments))

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", DEVICE.capability, 32)


@pytest.fixture
def device(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launching, "_compiled", {})
    fake = FakeDriver()
    monkeypatch.setattr(driver, "_active", fake)
    _gather_project_kernel.device_caches.clear()
    yield fake
    _gather_project_kernel.device_caches.clear()


def arguments(N=40, r=16, H=24, dtype=torch.float16, ids_dtype=torch.int64, offset=True, shift=0):
    codes = torch.zeros(50 * r + shift, dtype=dtype)[shift:].view(50, r)
    out, ids = torch.empty(N, H, dtype=dtype), torch.zeros(N, dtype=ids_dtype)
    return (
        ids,
        codes,
        torch.zeros(r, H, dtype=dtype),
        torch.zeros(H, dtype=dtype) if offset else None,
        1.0,
        out,
    )


def test_the_second_launch_is_that_of_triton_without_its_launcher(device, monkeypatch):
    forward_launch(*arguments(), device=DEVICE).run()
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: pytest.fail("Triton's launcher ran again"))
    again = arguments()
    forward_launch(*again, device=DEVICE).run()
    first, second = device.launched
    assert first[:3] == second[:3]
    assert [type(each) for each in first[3]] == [type(each) for each in second[3]]
    ids, codes, basis, offset, _, out = again
    for position, each in enumerate((ids, codes, basis, offset, out)):
        assert second[3][position] is each
    forward_launch(*arguments(N=60), device=DEVICE).run()  # another number of ids of one class
    assert device.launched[2][2] == first[2]
    position = _gather_project_kernel.arg_names.index("N")
    assert [each[3][position] for each in device.launched] == [40, 40, 60]


@pytest.mark.parametrize(
    "other",
    [dict(shift=1), dict(ids_dtype=torch.int32), dict(offset=False), dict(r=32), dict(dtype=torch.bfloat16)],
    ids=str,
)
def test_what_a_kernel_is_compiled_for_is_in_the_key(device, other):
    """Each launch has the kernel that Triton's launcher takes for it."""
    for given in ({}, other, {}, other):
        forward_launch(*arguments(**given), device=DEVICE).run()
    hashes = [each[2] for each in device.launched]
    assert hashes[0] == hashes[2] != hashes[1] == hashes[3]
    launching._compiled.clear()
    forward_launch(*arguments(**other), device=DEVICE).run()
    assert device.launched[4][2] == hashes[1]

"""The choice of a backend: a requested one serves or raises with a reason; the automatic one falls back."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from embkern.ops import backends, scale_gradient
from embkern.ops.backends import select, unavailable
from embkern.ops.library import overload


@pytest.fixture(autouse=True)
def _no_memory_between_tests():
    backends.forget()
    backends._log_once.cache_clear()
    yield
    backends.forget()


def test_the_best_backend_of_a_device_is_taken(native):
    assert select("gather_project", "cpu", torch.float32) == "native"
    assert select("gather_project", "cpu", torch.bfloat16) == "native"
    assert select("cosine_mse", "cpu", torch.bfloat16) == "native"
    assert select("gather_project", "meta", torch.float32) == "torch"


def test_without_the_extension_torch_serves_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(backends, "load_native", lambda: "the native extension is not built")
    with caplog.at_level(logging.WARNING, logger="embkern"):
        for op in ("gather_project", "cosine_mse"):
            for dtype in (torch.float32, torch.float16):
                assert select(op, "cpu", dtype) == "torch"
    assert [record.getMessage() for record in caplog.records] == [
        "falling back to the torch backend: the native extension is not built"
    ]
    with pytest.raises(
        RuntimeError, match="backend: 'native' cannot serve cosine_mse: the native extension is not"
    ):
        select("cosine_mse", "cpu", torch.float32, "native")


def test_the_environment_variable_is_obeyed_and_named_in_errors(monkeypatch):
    monkeypatch.setenv("EMBKERN_BACKEND", "torch")
    assert select("gather_project", "cpu", torch.float32) == "torch"
    monkeypatch.setenv("EMBKERN_BACKEND", "nativ")
    assert select("gather_project", "cpu", torch.float32) == "torch", "a choice is kept"
    backends.forget()
    with pytest.raises(
        ValueError, match="EMBKERN_BACKEND: expected one of native, triton, torch, got 'nativ'"
    ):
        select("gather_project", "cpu", torch.float32)
    monkeypatch.setenv("EMBKERN_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="EMBKERN_BACKEND: 'triton' cannot serve gather_project"):
        select("gather_project", "cpu", torch.float32)
    assert select("gather_project", "cpu", torch.float32, "torch") == "torch", "the argument wins"


@pytest.mark.parametrize("op", ["gather_project", "gather_decode", "packed_logits"])
def test_prefill_goes_to_triton_only_where_it_has_tensor_cores(monkeypatch, op):
    monkeypatch.setattr(backends, "unavailable", lambda *_: None)
    for dtype in backends.DTYPES:
        assert select(op, "cuda", dtype, regime="decode") == "native"
        by_triton = dtype.itemsize == 2 or op == "packed_logits"  # the C++ head has a product for few states
        assert select(op, "cuda", dtype, regime="prefill") == ("triton" if by_triton else "native")


def test_every_refusal_has_a_reason(monkeypatch):
    assert "no native kernel" in unavailable("native", "autoencoder", "cuda", torch.float32)
    assert "does not take torch.bfloat16" in unavailable("native", "autoencoder", "cpu", torch.bfloat16)
    assert "no native kernel" in unavailable("native", "gather_project", "meta", torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "interpreter" in unavailable("triton", "gather_project", "cpu", torch.float32)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in unavailable("triton", "gather_project", "cuda", torch.float32)
    for backend in (None, "torch"):
        with pytest.raises(TypeError, match="gather_project: dtype torch.int32 is not supported"):
            select("gather_project", "cpu", torch.int32, backend)


@pytest.mark.parametrize("name", ["triton", "native"])
def test_a_device_that_is_too_old_is_named(monkeypatch, name):
    pytest.importorskip("triton")
    monkeypatch.setattr(backends, "load_native", lambda: None)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in (((7, 5), "need compute capability 8.0 or more"), ((8, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        reason = unavailable(name, "cosine_mse", "cuda", torch.bfloat16)
        assert reason is None if expected is None else expected in reason


@pytest.mark.parametrize(
    ("usable", "expected"), [(("native", "triton"), "native"), (("triton",), "triton"), ((), None)]
)
def test_gradients_are_scaled_by_the_first_backend_that_can_be_used(monkeypatch, usable, expected):
    monkeypatch.setattr(
        scale_gradient, "unavailable", lambda backend, *_: None if backend in usable else "not here"
    )
    scale_gradient._cuda_kernel.cache_clear()
    try:
        kernel = scale_gradient._cuda_kernel()
    finally:
        scale_gradient._cuda_kernel.cache_clear()
    assert kernel is (expected and overload("scale_gradient_", expected))


NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
WITHOUT_GRADIENT = {"quantize_rows", "quantize_trellis"}  # of codes, which are whole numbers


def test_contributing_lists_every_kernel_with_direction_and_dtype():
    lines = ["| op | C++, CPU | C++, CUDA | Triton, CUDA |", "|---|---|---|---|"]
    for op in sorted(set().union(*backends.KERNELS.values())):
        cells = [f"`{op}`"]
        for backend, device_type in (("native", "cpu"), ("native", "cuda"), ("triton", "cuda")):
            kernel, dtypes = (
                (backend, device_type, op),
                backends.KERNEL_DTYPES.get((backend, device_type, op)),
            )
            if op not in backends.KERNELS[backend, device_type]:
                cells.append("")
                continue
            forward_only = kernel in backends.FORWARD_ONLY or op in WITHOUT_GRADIENT
            cell = "forward" if forward_only else "forward, backward"
            cells.append(cell if dtypes is None else f"{cell}: {', '.join(NAMES[each] for each in dtypes)}")
        lines.append("| " + " | ".join(cells) + " |")
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert "\n".join(lines).replace("|  |", "| |").replace("|  |", "| |") in text

"""Which backend can serve an op on a device, which one is taken, and why not another.

The order below is the measured preference. A backend that is asked for by name and cannot serve raises
and says why; the automatic choice falls back and logs the reason once. Nothing is decided at import.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Literal, TypeAlias, get_args

import torch

from .library import load_native

logger = logging.getLogger("embkern")

Backend: TypeAlias = Literal["native", "triton", "torch"]
BACKENDS: tuple[str, ...] = get_args(Backend)
ENVIRONMENT_VARIABLE = "EMBKERN_BACKEND"

# Best first, per device type, as `python -m benchmarks backends` measures it. A device that is not listed is
# served by torch alone.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("native", "torch"),
    "cuda": ("native", "triton", "torch"),
}
# Where one op in one dtype differs. The native gather_project widens bf16 to fp32; torch's product uses the
# CPU's bf16 instructions and looks up twice as fast from 16 tokens on.
EXCEPTIONS: dict[tuple[str, str, torch.dtype], tuple[str, ...]] = {
    ("gather_project", "cpu", torch.bfloat16): ("torch", "native"),
}

# The ops each kernel backend implements, per device type. A new kernel adds its line here.
KERNELS: dict[tuple[str, str], frozenset[str]] = {
    ("native", "cpu"): frozenset({"gather_project", "cosine_mse"}),
    ("native", "cuda"): frozenset(),
    ("triton", "cuda"): frozenset(),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def unavailable(backend: str, op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Return why ``backend`` cannot serve ``op`` on this device and dtype, or None if it can."""
    if backend == "torch":
        return None
    if op not in KERNELS.get((backend, device_type), ()):
        return f"there is no {backend} kernel of {op} for {device_type} tensors"
    return load_native() if backend == "native" else None


def select(op: str, device_type: str, dtype: torch.dtype, backend: str | None = None) -> str:
    """Return the backend that serves ``op``.

    Args:
        op: name of the op, ``"gather_project"`` or ``"cosine_mse"``.
        device_type: of the tensors, such as ``"cpu"``.
        dtype: of the floating-point tensors.
        backend: the caller's choice; None reads ``EMBKERN_BACKEND``, and without that takes the best.

    Raises:
        ValueError: the name is not one of ``native``, ``triton`` and ``torch``.
        RuntimeError: the backend asked for cannot serve the call, and why.
        TypeError: no backend takes this dtype.
    """
    if dtype not in DTYPES:
        raise TypeError(f"{op}: dtype {dtype} is not supported, only {', '.join(map(str, DTYPES))}")
    source = "backend"
    if backend is None:
        backend = os.environ.get(ENVIRONMENT_VARIABLE)
        source = ENVIRONMENT_VARIABLE
    if not backend:
        return _best(op, device_type, dtype)
    _check_requested(source, backend, op, device_type, dtype)
    return backend


# Under torch.compile the choice is made while tracing and is a constant of the graph. This is all that
# torch.compiler.assume_constant_result does, but that imports torch._dynamo: 1.4 s at `import embkern.ops`.
select._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _check_requested(source: str, backend: str, op: str, device_type: str, dtype: torch.dtype) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if reason := unavailable(backend, op, device_type, dtype):
        raise RuntimeError(f"{source}: {backend!r} cannot serve {op}: {reason}")


@functools.cache
def _best(op: str, device_type: str, dtype: torch.dtype) -> str:
    order = EXCEPTIONS.get((op, device_type, dtype)) or PREFERENCE.get(device_type, ("torch",))
    for backend in order:
        reason = unavailable(backend, op, device_type, dtype)
        if reason is None:
            return backend
        if op in KERNELS.get((backend, device_type), ()):
            _log_once(reason)
    raise AssertionError("the torch backend serves every device")


@functools.cache
def _log_once(reason: str) -> None:
    logger.warning("falling back to the torch backend: %s", reason)

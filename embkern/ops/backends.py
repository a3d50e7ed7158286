"""The choice of a backend: which ones can serve an op on a device, in which order, and why one cannot.

The order is that of the measurements. A backend requested by name that cannot serve raises with the reason;
the automatic choice falls back and logs the reason once. Nothing is decided at import.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from typing import Literal, TypeAlias, get_args

import torch

from .library import load_native

logger = logging.getLogger("embkern")

Backend: TypeAlias = Literal["native", "triton", "torch"]
BACKENDS: tuple[str, ...] = get_args(Backend)
ENVIRONMENT_VARIABLE = "EMBKERN_BACKEND"

# The fastest first, per device type, as measured on CPU by `python -m benchmarks gather_project` and
# `cosine_mse`. Only torch serves a device that is not listed.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("native", "torch"),
    "cuda": ("native", "triton", "torch"),
}
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES, torch.float64)
# Another order for one regime of one op, in some dtypes. These are by design and not yet measured: a decoding
# step is launched by the C++ kernels without the overhead of Triton's launcher; prefill of 16-bit factors
# uses the wgmma of Triton. Both multiply fp32 and fp64 outside the tensor cores, where the C++ kernels keep
# the codes on chip and Triton's read them again for every tile of columns. The C++ head multiplies a row at a
# time, in every dtype.
REGIMES: dict[tuple[str, str, str], tuple[tuple[str, ...], tuple[torch.dtype, ...]]] = {
    ("gather_project", "cuda", "prefill"): (("triton", "native", "torch"), HALVES),
    ("gather_decode", "cuda", "prefill"): (("triton", "native", "torch"), HALVES),
    ("packed_logits", "cuda", "prefill"): (("triton", "native", "torch"), DTYPES),
}
# Up to this many ids are decoding: launches and reads of the basis bound it. So are up to this many hidden
# states, which the C++ kernel multiplies with a row at a time.
DECODE_TOKENS, DECODE_STATES = 64, 16

# The ops that each kernel backend implements, per device type. A new kernel adds its op here.
KERNELS: dict[tuple[str, str], frozenset[str]] = {
    ("native", "cpu"): frozenset(
        {
            "gather_project",
            "gather_decode",
            "packed_cross_entropy",
            "packed_logits",
            "quantize_rows",
            "quantize_trellis",
            "cosine_mse",
            "autoencoder",
        }
    ),
    ("native", "cuda"): frozenset({"gather_project", "gather_decode", "packed_logits", "cosine_mse"}),
    ("triton", "cuda"): frozenset(
        {
            "gather_project",
            "gather_decode",
            "low_rank_cross_entropy",
            "packed_cross_entropy",
            "packed_logits",
            "cosine_mse",
            "autoencoder",
        }
    ),
}
# Kernels without a backward of their own.
FORWARD_ONLY: frozenset[tuple[str, str, str]] = frozenset({("native", "cuda", "packed_logits")})
# Kernels that do not take all of these dtypes.
KERNEL_DTYPES: dict[tuple[str, str, str], tuple[torch.dtype, ...]] = {
    ("native", "cpu", "autoencoder"): (torch.float32, torch.float64),
    ("native", "cpu", "quantize_rows"): (torch.float32,),
    ("native", "cpu", "quantize_trellis"): (torch.float32,),
}


def unavailable(backend: str, op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Return why ``backend`` cannot serve ``op`` on this device and dtype, or None if it can."""
    if backend == "torch":
        return None
    if backend == "triton" and op in KERNELS["triton", "cuda"]:
        return _triton_unavailable(device_type, dtype)
    if op not in KERNELS.get((backend, device_type), ()):
        return f"there is no {backend} kernel of {op} for {device_type} tensors"
    if dtype not in KERNEL_DTYPES.get((backend, device_type, op), DTYPES):
        return f"the {backend} kernel of {op} does not take {dtype}"
    return load_native() or _native_cuda_unavailable(op, device_type)


def _native_cuda_unavailable(op: str, device_type: str) -> str | None:
    if device_type != "cuda":
        return None
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"embkern::{op}_forward.native", "CUDA"):
        return "the native extension was built without CUDA (no nvcc, or a CPU build of torch)"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "the CUDA kernels need compute capability 8.0 or more"
    return None


def _triton_unavailable(device_type: str, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cuda":
        if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
            return "the Triton kernels need compute capability 8.0 or more"
        return None
    if device_type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton runs on {device_type} tensors only in its interpreter (TRITON_INTERPRET=1, CPU)"
    return "bf16 is wrong in Triton's interpreter" if dtype == torch.bfloat16 else None


def select(
    op: str, device_type: str, dtype: torch.dtype, backend: str | None = None, regime: str | None = None
) -> str:
    """Return the backend that serves ``op``.

    The choice for a combination of arguments, ``EMBKERN_BACKEND`` included, is made once and kept until
    ``forget``.

    Args:
        op: name of the op, such as ``"gather_project"``.
        device_type: device type of the tensors, such as ``"cpu"``.
        dtype: dtype of the floating-point tensors.
        backend: the caller's choice. None reads ``EMBKERN_BACKEND`` and takes the best if it is not set.
        regime: a class of shapes for which ``REGIMES`` has an order of its own.

    Raises:
        ValueError: the name is not one of ``native``, ``triton`` and ``torch``.
        RuntimeError: the requested backend cannot serve the call; the message says why.
        TypeError: no backend takes this dtype.
    """
    key = (op, device_type, dtype, backend, regime)
    chosen = _chosen.get(key)
    if chosen is None:
        chosen = _chosen[key] = _choose(*key)
    return chosen


def regime_of(count: int, most: int = DECODE_TOKENS) -> str | None:
    """Return the class of a number of rows that chooses between CUDA kernels: ``decode`` or ``prefill``."""
    if torch.compiler.is_compiling():  # A compiled graph serves every number.
        return None
    return "decode" if count <= most else "prefill"


def select_backward(op: str, device_type: str, dtype: torch.dtype, forward: str) -> str:
    """Return the backend of the gradient: that of the forward, or the best that has a gradient."""
    if (forward, device_type, op) not in FORWARD_ONLY:
        return forward
    return "torch" if unavailable("triton", op, device_type, dtype) else "triton"


_chosen: dict[tuple[str, str, torch.dtype, str | None, str | None], str] = {}
# Under torch.compile the choice is made while tracing and is a constant of the graph. The function
# torch.compiler.assume_constant_result sets this attribute, but imports torch._dynamo: 1.4 s at import.
select._dynamo_marked_constant = True  # type: ignore[attr-defined]
select_backward._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forget() -> None:
    """Forget all choices, so that a change of ``EMBKERN_BACKEND`` takes effect."""
    _chosen.clear()


def _choose(op: str, device_type: str, dtype: torch.dtype, backend: str | None, regime: str | None) -> str:
    if dtype not in DTYPES:
        raise TypeError(f"{op}: dtype {dtype} is not supported, only {', '.join(map(str, DTYPES))}")
    source = "backend"
    if backend is None:
        backend = os.environ.get(ENVIRONMENT_VARIABLE)
        source = ENVIRONMENT_VARIABLE
    if backend:
        if backend not in BACKENDS:
            raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {backend!r}")
        if reason := unavailable(backend, op, device_type, dtype):
            raise RuntimeError(f"{source}: {backend!r} cannot serve {op}: {reason}")
        return backend
    order, dtypes = REGIMES.get((op, device_type, regime or ""), ((), ()))
    if dtype not in dtypes:
        order = PREFERENCE.get(device_type, ("torch",))
    reasons: list[str] = []
    for candidate in order:
        reason = unavailable(candidate, op, device_type, dtype)
        if reason is None:
            for missed in reasons:
                _log_once(candidate, missed)
            return candidate
        if op in KERNELS.get((candidate, device_type), ()):
            reasons.append(reason)
    raise AssertionError("the torch backend serves every device")


@functools.cache
def _log_once(backend: str, reason: str) -> None:
    logger.warning("falling back to the %s backend: %s", backend, reason)

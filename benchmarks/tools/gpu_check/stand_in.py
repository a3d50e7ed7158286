"""The place of a rehearsal: Triton's interpreter and the CUDA emulator of tests/cuda, on CPU tensors.

A rehearsal tests the checklist and the numerical results of the kernels. The interpreter does not round bf16
as a device does, so that fp16 replaces it in Triton's kernels; the emulator runs the C++ kernels in bf16.
There are no CUDA graphs: a second call takes the place of a replay. Times are the interpreter's.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embkern.experiments.environment import version_of
from embkern.ops.library import overload

from .place import Call, Device
from .processes import ROOT

PROGRAMS = (
    *("gather_project", "gather_project_backward", "gather_decode", "packed_logits"),
    *("cosine_mse", "scale_gradient"),
)


def interpreter_fails() -> str | None:
    """Return why Triton's interpreter cannot be used here, or None if it can."""
    triton, numpy = version_of("triton"), version_of("numpy")
    if triton is None:
        return "triton is not installed"
    if _release(triton) <= (3, 6) and _release(numpy or "0.0") >= (2, 4):
        # The interpreter calls `int` on an array of one element, which NumPy 2.4 refuses.
        return (
            f"the interpreter of Triton {triton} does not run with NumPy {numpy}; with one below 2.4 it does"
        )
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "TRITON_INTERPRET=1 has to be set before Triton is imported"
    return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


class StandIn(Device):
    """The interpreter for Triton's kernels and the emulator for those in CUDA C++."""

    type = "cpu"
    rehearsal = True
    replays = "second call"

    def dtypes(self, backend: str) -> tuple[str, ...]:
        """Return the dtypes that a backend's kernels are checked in."""
        return ("fp16", "fp32") if backend == "triton" else ("bf16", "fp32")

    def unavailable(self, op: str, backend: str) -> str | None:
        """Return why a backend's kernels cannot be imitated here, or None if they can."""
        if backend == "triton":
            return interpreter_fails()
        from tests.cuda.emulated import COMPILER

        return None if COMPILER else "the emulator needs a C++ compiler (g++, or CXX)"

    def op(self, name: str, backend: str) -> Callable[..., Any]:
        """Return the raw op of one backend: interpreted, or of the emulator."""
        if backend == "triton":
            return overload(name, "triton")
        emulated: dict[str, Callable[..., Any]] = {
            "gather_project_forward": _emulated_gather_project,
            "gather_project_out": _emulated_gather_project_out,
            "gather_project_backward": _emulated_gather_project_backward,
            "gather_decode_forward": _emulated_gather_decode,
            "packed_logits_forward": _emulated_packed_logits,
            "cosine_mse_forward": _emulated_cosine_mse,
            "scale_gradient_": _emulated_scale_gradient,
        }
        return emulated[name]

    def synchronize(self) -> None:
        """Do nothing: no call is asynchronous."""

    def lost(self) -> str | None:
        """Return None: there is no context to lose."""
        return None

    @contextlib.contextmanager
    def form(self, by_gram: bool) -> Iterator[None]:
        """Use one form of the autoencoder's loss for any shape, with the rows in several blocks."""
        from embkern.triton.autoencoder import gram_form, row_form

        before = gram_form.gram_pays, row_form.Y_BYTES
        gram_form.gram_pays, row_form.Y_BYTES = (lambda *_: by_gram), 3000
        try:
            yield
        finally:
            gram_form.gram_pays, row_form.Y_BYTES = before

    def release(self) -> None:
        """Do nothing: no memory is cached."""

    def replay(self, call: Call, change: Callable[[], None]) -> tuple[Tensor, ...]:
        """Call a second time, with other inputs."""
        call()
        change()
        return call()

    def time(self, call: Call, samples: int = 2) -> tuple[list[float], str]:
        """Return times of a call in microseconds, of the interpreter and not of a device."""
        times = []
        for _ in range(samples):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e6)
        return times, "perf_counter"


def raise_assertions() -> None:
    """Enable the kernels' assertions in the interpreter, which skips them by default."""
    from triton.runtime import interpreter

    options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options


@functools.cache
def program(op: str) -> Path:
    """Return the emulator's program of an op, compiled once for these sources."""
    from tests.cuda import emulated

    sources = sorted(
        [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc/cuda").iterdir(), *_files(emulated.SOURCES)]
    )
    key = hashlib.sha256(f"{torch.__version__} {emulated.COMPILER}".encode())
    for source in sources:
        key.update(source.read_bytes())
    folder = ROOT / "build" / "emulator" / key.hexdigest()[:16]
    if not (folder / op).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            os.replace(emulated.build(op, Path(temporary)), folder / op)
    return folder / op


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _emulated_gather_project(
    ids: Tensor, codes: Tensor, basis: Tensor, offset: Tensor | None, scale: float
) -> Tensor:
    from tests.cuda.emulated import Outputs, gather_project_call

    call = gather_project_call(ids, codes, basis, offset, scale)
    with tempfile.TemporaryDirectory() as folder:
        outputs = Outputs(program("gather_project"), [call], Path(folder))
    return outputs.take(codes.dtype, len(ids), basis.shape[1])


def _emulated_gather_project_out(
    ids: Tensor, codes: Tensor, basis: Tensor, offset: Tensor | None, scale: float, out: Tensor
) -> None:
    out.copy_(_emulated_gather_project(ids, codes, basis, offset, scale))


def _emulated_gather_project_backward(
    grad: Tensor,
    ids: Tensor,
    codes: Tensor,
    basis: Tensor,
    scale: float,
    padding_idx: int,
    needs_codes: bool,
    needs_basis: bool,
    needs_offset: bool,
    sparse: bool,
) -> tuple[Tensor, ...]:
    from tests.cuda.emulated import Outputs, gather_project_backward_call

    options = (scale, padding_idx, needs_basis, needs_offset, sparse)
    call = gather_project_backward_call(grad, ids, codes, basis, *options)
    with tempfile.TemporaryDirectory() as folder:
        outputs = Outputs(program("gather_project_backward"), [call], Path(folder))
    (V, r), H = codes.shape, basis.shape[1]
    shapes = ((len(ids) if sparse else V, r), (r, H) if needs_basis else (0,), (H if needs_offset else 0,))
    return ids.long() if sparse else ids.new_empty(0), *(outputs.take(codes.dtype, *each) for each in shapes)


def _emulated_gather_decode(ids: Tensor, *arguments: Any) -> Tensor:
    from tests.cuda.emulated import Outputs, gather_decode_call

    scales, embedding_dim = arguments[4], arguments[7]
    with tempfile.TemporaryDirectory() as folder:
        outputs = Outputs(program("gather_decode"), [gather_decode_call(ids, *arguments)], Path(folder))
    return outputs.take(scales.dtype, len(ids), embedding_dim)


def _emulated_packed_logits(hidden: Tensor, *packed: Any) -> Tensor:
    from tests.cuda.emulated import Outputs, packed_logits_call

    with tempfile.TemporaryDirectory() as folder:
        outputs = Outputs(program("packed_logits"), [packed_logits_call(hidden, *packed)], Path(folder))
    return outputs.take(hidden.dtype, len(hidden), len(packed[4]))


def _emulated_cosine_mse(
    output: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    target_norm: Tensor | None,
    grad_loss: Tensor | None,
    reduction: int,
    *options: Any,
) -> tuple[Tensor, ...]:
    from tests.cuda.emulated import Outputs, cosine_mse_call, cosine_mse_results

    tensors = (output, target, row_weight, target_norm, grad_loss)
    call = cosine_mse_call(*tensors, reduction, *options)
    with tempfile.TemporaryDirectory() as folder:
        outputs = Outputs(program("cosine_mse"), [call], Path(folder))
    shapes = cosine_mse_results(output, reduction, options[-2:])
    return tuple(outputs.take(dtype, *shape) for dtype, shape in shapes)


def _emulated_scale_gradient(grad: Tensor, grad_loss: Tensor) -> None:
    from tests.cuda.emulated import Outputs, scale_gradient_call

    with tempfile.TemporaryDirectory() as folder:
        outputs = Outputs(program("scale_gradient"), [scale_gradient_call(grad, grad_loss)], Path(folder))
    grad.copy_(outputs.take(grad.dtype, *grad.shape))


def place_of(rehearse: bool) -> Device:
    """Return the device, or what stands in for it."""
    return StandIn() if rehearse else Device()

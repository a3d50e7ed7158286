"""Builds and runs the programs of tests/cuda/emulator, one per op."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from embkern.ops import reference

ROOT = Path(__file__).parents[2]
SOURCES = Path(__file__).parent / "emulator"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler (g++, or CXX)"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the emulator uses ucontext"),
]

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}
HOPPER_SHARED, HOPPER_MULTIPROCESSORS = 227 * 1024, 132


def build(op: str, folder: Path, *flags: str) -> Path:
    """Compile the program of ``op``."""
    assert COMPILER is not None
    program = folder / op
    includes = [SOURCES, ROOT / "csrc", *include_paths()]
    command = [COMPILER, "-std=c++17", "-Wall", "-Wno-unknown-pragmas", "-fno-strict-aliasing", "-O1", *flags]
    command += [f"-I{each}" for each in includes]
    subprocess.run([*command, str(SOURCES / f"{op}.cpp"), "-o", str(program)], check=True)
    return program


def build_sanitized(op: str, folder: Path) -> Path:
    """Compile the program of ``op`` with checks of bounds and alignment."""
    try:
        return build(op, folder, "-fsanitize=address,alignment", "-fno-sanitize-recover=alignment")
    except subprocess.CalledProcessError:
        pytest.skip("the compiler has no address sanitizer")


def programs(op: str) -> tuple[Any, Any]:
    """Return the fixtures of a module's program: plain, and with checks of bounds and alignment."""

    @pytest.fixture(scope="module")
    def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return build(op, tmp_path_factory.mktemp("emulator"))

    @pytest.fixture(scope="module")
    def sanitized_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return build_sanitized(op, tmp_path_factory.mktemp("sanitized"))

    return program, sanitized_program


def start(program: Path, calls: Iterable[bytes], folder: Path) -> subprocess.CompletedProcess:
    """Run serialised calls; the outputs go to the file ``out``."""
    (folder / "in").write_bytes(b"".join(calls))
    return subprocess.run([str(program), folder / "in", folder / "out"], capture_output=True, text=True)


def serialised(*tensors: torch.Tensor | None) -> bytes:
    """Return the bytes of the tensors that are not None."""
    given = [each for each in tensors if each is not None and each.numel()]
    return b"".join(each.reshape(-1).view(torch.uint8).numpy().tobytes() for each in given)


def spaced(matrix: torch.Tensor, apart: int) -> torch.Tensor:
    """Return the matrix with ``apart`` NaN between one row and the next."""
    wide = torch.full((matrix.shape[0], matrix.shape[1] + apart), torch.nan, dtype=matrix.dtype)
    wide[:, : matrix.shape[1]] = matrix
    return wide[:, : matrix.shape[1]]


def memory_of(matrix: torch.Tensor) -> torch.Tensor:
    """Return all elements from the first to the last one of a matrix, with those between its rows."""
    rows, columns = matrix.shape
    return matrix.as_strided(((rows - 1) * matrix.stride(0) + columns if columns else 0,), (1,))


class Outputs:
    """The output of a run, read tensor by tensor."""

    def __init__(self, program: Path, calls: Iterable[bytes], folder: Path) -> None:
        done = start(program, calls, folder)
        assert done.returncode == 0, done.stderr
        self.data = bytearray((folder / "out").read_bytes())

    def take(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """Return the next tensor."""
        size = torch.Size(shape).numel() * dtype.itemsize
        taken, self.data = self.data[:size], self.data[size:]
        return torch.frombuffer(taken, dtype=dtype).view(shape) if size else torch.empty(shape, dtype=dtype)


class SerialisedCall(Protocol):
    """A call of an op."""

    def serialised(self) -> bytes:
        """Return it in the format of the program."""

    def take(self, outputs: Outputs) -> Any:
        """Read its results."""


def run(program: Path, calls: Sequence[SerialisedCall], folder: Path) -> list[Any]:
    """Run calls and return the results of each."""
    outputs = Outputs(program, (call.serialised() for call in calls), folder)
    results = [call.take(outputs) for call in calls]
    assert not outputs.data
    return results


def gather_project_call(
    ids: torch.Tensor,
    codes: torch.Tensor,
    basis: torch.Tensor,
    offset: torch.Tensor | None,
    scale: float,
    *,
    misaligned: int = 0,
    multiprocessors: int = HOPPER_MULTIPROCESSORS,
    shared: int = HOPPER_SHARED,
    order: str = "ascending",
) -> bytes:
    """Return a call of gather_project in the format of emulator/gather_project.cpp."""
    (V, r), H = codes.shape, basis.shape[1]
    header = (
        *(DTYPES[codes.dtype], ids.dtype == torch.int64, len(ids), V, r, H, codes.stride(0)),
        *(offset is not None, misaligned, multiprocessors, shared, ORDERS[order]),
    )
    tensors = serialised(ids, memory_of(codes), basis, offset)
    return struct.pack("<12qd", *map(int, header), scale) + tensors


def gather_project_backward_call(
    grad: torch.Tensor,
    ids: torch.Tensor,
    codes: torch.Tensor,
    basis: torch.Tensor,
    scale: float,
    padding_idx: int,
    needs_basis: bool,
    needs_offset: bool,
    sparse: bool,
    *,
    misaligned: int = 0,
    multiprocessors: int = HOPPER_MULTIPROCESSORS,
    shared: int = HOPPER_SHARED,
    order: str = "ascending",
) -> bytes:
    """Return a call of gather_project_backward in the format of emulator/gather_project_backward.cpp."""
    (V, r), H = codes.shape, basis.shape[1]
    header = (
        *(DTYPES[codes.dtype], ids.dtype == torch.int64, len(ids), V, r, H, codes.stride(0), misaligned),
        *(padding_idx, sparse, needs_basis, needs_offset, multiprocessors, shared, ORDERS[order]),
    )
    tensors = serialised(grad, ids, memory_of(codes), basis, *torch.sort(ids, stable=True))
    return struct.pack("<15qd", *map(int, header), scale) + tensors


def gather_decode_call(
    ids: torch.Tensor,
    records: torch.Tensor,
    directory: torch.Tensor,
    tiers: torch.Tensor,
    levels: torch.Tensor,
    scales: torch.Tensor,
    basis: torch.Tensor | None,
    offset: torch.Tensor | None,
    embedding_dim: int,
    scale: float,
    *,
    misaligned: int = 0,
    multiprocessors: int = HOPPER_MULTIPROCESSORS,
    shared: int = HOPPER_SHARED,
    order: str = "ascending",
) -> bytes:
    """Return a call of gather_decode in the format of emulator/gather_decode.cpp."""
    K = 0 if basis is None else len(basis)
    header = (
        *(DTYPES[scales.dtype], ids.dtype == torch.int64, ids.numel(), len(scales), len(records)),
        *(len(tiers), tiers.shape[1] - 1, K, embedding_dim, offset is not None),
        *(misaligned, multiprocessors, shared, ORDERS[order]),
    )
    tensors = serialised(ids, records, directory, tiers, levels, scales, basis, offset)
    return struct.pack("<14qd", *map(int, header), scale) + tensors


def packed_logits_call(
    hidden: torch.Tensor,
    records: torch.Tensor,
    directory: torch.Tensor,
    tiers: torch.Tensor,
    levels: torch.Tensor,
    scales: torch.Tensor,
    basis: torch.Tensor | None,
    offset: torch.Tensor | None,
    *,
    multiprocessors: int = HOPPER_MULTIPROCESSORS,
    order: str = "ascending",
) -> bytes:
    """Return a call of packed_logits in the format of emulator/packed_logits.cpp."""
    K = 0 if basis is None else len(basis)
    header = (
        *(DTYPES[scales.dtype], DTYPES[hidden.dtype], len(hidden), len(scales), len(records), len(tiers)),
        *(tiers.shape[1] - 1, K, hidden.shape[1], offset is not None, multiprocessors, ORDERS[order]),
    )
    tensors = serialised(hidden, records, directory, tiers, levels, scales, basis, offset)
    return struct.pack("<12q", *map(int, header)) + tensors


def cosine_mse_call(
    output: torch.Tensor,
    target: torch.Tensor,
    row_weight: torch.Tensor | None,
    target_norm: torch.Tensor | None,
    grad_loss: torch.Tensor | None,
    reduction: int,
    cosine_weight: float,
    mse_weight: float,
    rmse_weight: float,
    power_weight: float,
    alpha: float,
    eps: float,
    needs_output: bool,
    needs_target: bool,
    *,
    misaligned: int = 0,
    multiprocessors: int = HOPPER_MULTIPROCESSORS,
    order: str = "ascending",
) -> bytes:
    """Return a call of cosine_mse in the format of emulator/cosine_mse.cpp."""
    header = (
        *(DTYPES[output.dtype], *output.shape, reduction, row_weight is not None, target_norm is not None),
        *(0 if grad_loss is None else grad_loss.numel(), needs_output, needs_target),
        *(misaligned, multiprocessors, ORDERS[order]),
    )
    scalars = (cosine_weight, mse_weight, rmse_weight, power_weight, alpha, eps)
    tensors = serialised(output, target, row_weight, target_norm, grad_loss)
    return struct.pack("<12q6d", *map(int, header), *scalars) + tensors


def scale_gradient_call(
    grad: torch.Tensor,
    factor: torch.Tensor,
    misaligned: int = 0,
    multiprocessors: int = HOPPER_MULTIPROCESSORS,
) -> bytes:
    """Return a call of scale_gradient_ in the format of emulator/scale_gradient.cpp."""
    header = (DTYPES[grad.dtype], *grad.shape, factor.dim(), misaligned, multiprocessors)
    return struct.pack("<6q", *header) + serialised(grad, factor)


def cosine_mse_results(
    output: torch.Tensor, reduction: int, needs: tuple[bool, bool]
) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of each output of cosine_mse: the loss, and the gradients in ``needs``."""
    loss = (len(output),) if reduction == reference.NONE else ()
    matrices = [(output.dtype, tuple(output.shape) if needed else (0,)) for needed in needs]
    return [(reference.accumulation_dtype(output.dtype), loss), *matrices]

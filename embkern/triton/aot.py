"""Compile every kernel ahead of time, with no GPU, and report what the compiler made of it.

    python -m embkern.triton.aot [--capability 80 90 100] [--json PATH]

The launches are those of the launchers, for A100, H100 and B200 and for shapes of every class in the tile
table; equal ones compile once. Registers and shared memory are the cubin's resource usage; spills (loads and
stores of local memory) and instructions are counted in its SASS.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from ..ops.packed_codes import GROUP, LEVELS_SHAPE
from ..ops.packed_format import ENTRY_WORDS, PackedTensors
from ..ops.reference import MEAN, NONE, SUM, accumulation_dtype
from . import cosine_mse as cm
from . import gather_decode as gd
from .autoencoder import gram_form, row_form
from .autoencoder.shared import Options, finish_launch
from .cross_entropy.shapes import HEAD_SHAPES, HeadShape, head_launches
from .gather_project.forward import forward_launch
from .gather_project.grad_basis import grad_basis_launches
from .gather_project.grad_codes import project_grad_launch, segment_launches
from .launch import Launch
from .scale_gradient import scale_launch
from .tiles import REPRESENTATIVE, Device

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Warp-level mma.sync, Hopper's warp-group wgmma, Blackwell's tcgen05; DMMA is the fp64 one.
_TENSOR_CORE = re.compile(r"\b(HMMA|DMMA|HGMMA|UTCHMMA)\b")
V = 128256


@dataclass(frozen=True)
class Shape:
    """One problem of gather_project: N positions, rank r, H columns, and the dtype of the factors."""

    N: int
    r: int
    H: int
    dtype: torch.dtype = torch.bfloat16
    ids_dtype: torch.dtype = torch.int64
    apart: int = 0  # elements between rows of codes

    def __str__(self) -> str:
        """Return it in one line."""
        rank = f"{self.r}+{self.apart}" if self.apart else f"{self.r}"
        return f"N={self.N} r={rank} H={self.H} {str(self.dtype).removeprefix('torch.')}"


# Both tiles, ranks on chip and in steps, aligned and not; the widths of BERT and Llama; an odd width.
SHAPES = (
    *(Shape(16384, r, H) for r, H in ((256, 2048), (75, 768), (299, 768), (512, 4096), (640, 2048))),
    *(Shape(4, r, H) for r, H in ((256, 2048), (75, 768), (640, 2048))),
    *(Shape(N, 75, 768, apart=5) for N in (16384, 4)),
    Shape(16384, 299, 768, apart=5),
    Shape(16384, 63, 77, ids_dtype=torch.int32),
    Shape(16384, 256, 2048, torch.float16),
    *(Shape(N, r, H, torch.float32) for N in (16384, 4) for r, H in ((256, 2048), (75, 768))),
    Shape(16384, 75, 768, torch.float64),
)


@dataclass(frozen=True)
class LossShape:
    """One problem of cosine_mse_loss: N rows of H columns, and the weights of its terms.

    With ``everything`` there are row weights, target norms, an incoming gradient and both gradients;
    otherwise only the gradient of output, as in training.
    """

    N: int
    H: int
    dtype: torch.dtype = torch.float32
    weights: tuple[float, float, float, float] = (1.0, 1.0, 0.0, 0.0)
    alpha: float = 1.0
    reduction: int = MEAN
    everything: bool = False

    def __str__(self) -> str:
        """Return it in one line."""
        terms = ",".join(f"{weight:g}" for weight in self.weights)
        return f"N={self.N} H={self.H} {terms} {str(self.dtype).removeprefix('torch.')}"


_TERMS = (0.5, 1.0, 0.25, 0.0025)
# Widths that are not powers of two, rows in one to four warps, rows in several blocks of columns, short and
# odd rows, the authors' batch of 32; every term, with the root of the batch and with roots of the rows.
LOSS_SHAPES = (
    *(LossShape(30522, H) for H in (384, 768, 1152, 4096)),
    *(LossShape(30522, H, torch.bfloat16) for H in (384, 768, 1152, 4096)),
    LossShape(30522, 768, torch.float16),
    LossShape(30522, 768, torch.float32, _TERMS, 0.5, everything=True),
    LossShape(30522, 768, torch.bfloat16, _TERMS, 0.5, NONE, everything=True),
    LossShape(30522, 768, torch.float64, _TERMS, 0.5, NONE, everything=True),
    LossShape(32, 768, torch.float32, (0.1995, 0.0, 0.0, 0.0025), 0.5),
    LossShape(4096, 12288, torch.bfloat16, _TERMS, 0.5, NONE, everything=True),
    LossShape(4096, 12288, torch.float32, _TERMS, 0.5, NONE, everything=True),
    LossShape(30522, 64, torch.float32, _TERMS, 0.5, NONE, everything=True),
    LossShape(30522, 77, torch.float16, _TERMS, 0.5, NONE, everything=True),
)


@dataclass(frozen=True)
class AutoencoderShape:
    """One problem of autoencoder_loss: N rows of H columns, rank r; bare: without offset and row values."""

    N: int
    r: int
    H: int
    dtype: torch.dtype = torch.float32
    bare: bool = False

    def __str__(self) -> str:
        """Return it in one line."""
        return f"N={self.N} r={self.r} H={self.H} {str(self.dtype).removeprefix('torch.')}"


# The paper's tables and batch, a large bf16 table, odd rows in every dtype; fp16 has no Gram form.
AUTOENCODER_SHAPES = (
    *(AutoencoderShape(30522, r, 768, bare=bare) for r in (75, 299) for bare in (False, True)),
    AutoencoderShape(32, 75, 768),
    AutoencoderShape(128256, 256, 2048, torch.bfloat16),
    AutoencoderShape(30522, 75, 768, torch.float64),
    *(
        AutoencoderShape(30522, 63, 77, dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    ),
)


@dataclass(frozen=True)
class PackedShape:
    """One problem of gather_decode: N positions, K rows of the basis (0: none), H columns, T tiers."""

    N: int
    K: int
    H: int
    dtype: torch.dtype = torch.float32
    ids_dtype: torch.dtype = torch.int64
    T: int = 6

    def __str__(self) -> str:
        """Return it in one line."""
        return f"N={self.N} K={self.K} H={self.H} {str(self.dtype).removeprefix('torch.')}"


# Many and few rows; coefficients on chip and in steps; widths of small and large models; odd; no basis.
PACKED_SHAPES = (
    *(PackedShape(N, 128, 768, dtype) for N in (16384, 4) for dtype in (torch.float32, torch.bfloat16)),
    PackedShape(16384, 128, 384),
    PackedShape(16384, 256, 4096, torch.bfloat16),
    PackedShape(16384, 640, 2048, torch.bfloat16),
    PackedShape(16384, 96, 97, torch.float16, torch.int32),
    PackedShape(16384, 128, 768, torch.float64),
    PackedShape(16384, 0, 768, torch.bfloat16),
)
AnyShape: TypeAlias = Shape | LossShape | AutoencoderShape | PackedShape | HeadShape


@dataclass(frozen=True)
class Report:
    """What one kernel costs on one architecture."""

    kernel: str
    capability: int
    shape: str
    tile: str
    registers: int
    spills: int
    stack_bytes: int
    shared_bytes: int
    shared_limit: int
    tensor_core: str
    wide_loads: int
    async_copies: int


def loss_launches(shape: LossShape, device: Device) -> Iterator[Launch]:
    """Yield the launches of the loss and of its scaled gradient, on tensors of the meta device."""
    N, H, accumulation = shape.N, shape.H, accumulation_dtype(shape.dtype)

    def tensor(*size: int, dtype: torch.dtype = accumulation) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    per_loss = (N,) if shape.reduction == NONE else ()
    output, target, grad_output, grad_target = (tensor(N, H, dtype=shape.dtype) for _ in range(4))
    yield from cm.forward_launches(
        output,
        target,
        row_weight=tensor(N) if shape.everything else None,
        target_norm=tensor(N) if shape.everything else None,
        grad_loss=tensor(*per_loss) if shape.everything else None,
        reduction=shape.reduction,
        weights=shape.weights,
        alpha=shape.alpha,
        eps=1e-8,
        loss=tensor(*per_loss),
        grad_output=grad_output,
        grad_target=grad_target if shape.everything else None,
    )
    yield scale_launch(grad_output, tensor(*per_loss), device)


def autoencoder_launches(shape: AutoencoderShape) -> Iterator[Launch]:
    """Yield the launches of both forms, which run between the products, on tensors of the meta device."""
    N, r, H, work = shape.N, shape.r, shape.H, accumulation_dtype(shape.dtype)

    def tensor(*size: int, dtype: torch.dtype = work) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    width = -(-(r + (not shape.bare)) // 8) * 8
    target, left = tensor(N, H, dtype=shape.dtype), tensor(N, 2 * width, dtype=shape.dtype)
    weight, norm = (None, None) if shape.bare else (tensor(N), tensor(N))
    inner = work if shape.dtype.itemsize == 2 else torch.float64
    both, gram_products = tensor(N, 2 * width), tensor(N, width, dtype=inner)
    codes, products = both[:, :width], both[:, width:]
    options = Options(MEAN, 1.0, 1.0, 0.25, 0.0, 0.5, 1e-8)
    by_gram, sums, slopes = gram_form.row_losses_launches(
        target,
        codes,
        products,
        gram_products,
        tensor(width, width, dtype=inner),
        tensor(width, H),
        weight,
        norm,
        options,
        True,
    )
    finish, _, totals = finish_launch(sums, H, work, options)
    yield finish
    if shape.dtype != torch.float16:
        yield from by_gram
        assert slopes is not None
        grads = left[:, :width], left[:, width:]
        yield gram_form.row_gradients_launch(codes, products, gram_products, weight, slopes, totals, *grads)
    power = options._replace(power_weight=0.0025)
    for tile in (row_form.FEW_ROWS_TILE, row_form.ROWS_TILE):
        yield row_form.rows_launch(target, target, norm, weight, sums, power, tile)
    by_block = power._replace(reduction=SUM, rmse_weight=0.0)
    for terms in (by_block, by_block._replace(cosine_weight=0.0, power_weight=0.0)):
        yield from row_form.gradient_launches(target, target, norm, weight, torch.empty_like(target), terms)


def packed_launches(shape: PackedShape, device: Device) -> Iterator[Launch]:
    """Yield the launches of gather_decode, on tensors of the meta device."""

    def tensor(*size: int, dtype: torch.dtype = shape.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    groups = -(-shape.H // GROUP)
    packed = PackedTensors(
        tensor(V * 3 * groups, dtype=torch.int32),
        tensor(-(-V // GROUP), ENTRY_WORDS, dtype=torch.int32),
        tensor(shape.T, 1 + groups, dtype=torch.uint8),
        tensor(*LEVELS_SHAPE, dtype=torch.int8),
        tensor(V),
        tensor(shape.K, shape.H) if shape.K else None,
        tensor(shape.H),
    )
    ids, out = tensor(shape.N, dtype=shape.ids_dtype), tensor(shape.N, shape.H)
    yield from gd.forward_launches(ids, packed, 1.0, out, device)


def launches(shape: AnyShape, device: Device) -> Iterator[Launch]:
    """Yield every launch of a problem, forward and backward, on tensors of the meta device."""
    if isinstance(shape, LossShape):
        yield from loss_launches(shape, device)
        return
    if isinstance(shape, AutoencoderShape):
        yield from autoencoder_launches(shape)
        return
    if isinstance(shape, PackedShape):
        yield from packed_launches(shape, device)
        return
    if isinstance(shape, HeadShape):
        yield from head_launches(shape, device)
        return

    def tensor(*size: int, dtype: torch.dtype = shape.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    N, r, H = shape.N, shape.r, shape.H
    ids, basis, offset = tensor(N, dtype=shape.ids_dtype), tensor(r, H), tensor(H)
    codes = tensor(V, r + shape.apart)[:, :r]
    rows = tensor(N, r, dtype=accumulation_dtype(shape.dtype))
    yield forward_launch(ids, codes, basis, offset, 1.0, tensor(N, H), device)
    yield project_grad_launch(tensor(N, H), ids, codes, basis, 1.0, -1, rows, device)
    yield from segment_launches(rows, ids, tensor(N, dtype=torch.int64), tensor(V, r))
    yield from grad_basis_launches(tensor(N, H), ids, codes, 1.0, -1, basis, offset, device)


def report(launch: Launch, device: Device, shape: str = "") -> Report:
    """Compile a launch for a device and read the cubin."""
    compiled = launch.compile(device.capability)
    sass = _disassemble(compiled)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", sass)
    assert usage, f"cuobjdump printed no resource usage:\n{sass[:1000]}"
    blocks = {key: value for key, value in launch.arguments.items() if key.isupper() and len(key) > 1}
    tile = " ".join(f"{key.removeprefix('BLOCK_')}={value}" for key, value in blocks.items())
    return Report(
        kernel=launch.kernel.__name__,
        capability=device.capability,
        shape=shape,
        tile=f"{tile} warps={launch.num_warps} stages={launch.num_stages}",
        registers=int(usage[1]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        stack_bytes=int(usage[2]),
        shared_bytes=compiled.metadata.shared,
        shared_limit=device.shared_bytes,
        tensor_core=" ".join(sorted(set(_TENSOR_CORE.findall(sass)))),
        wide_loads=len(re.findall(r"\bLDG(?:STS)?\.\S*\.128\b", sass)),
        async_copies=len(re.findall(r"\bLDGSTS\b", sass)),
    )


def _disassemble(compiled: CompiledKernel) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        command = [str(_CUOBJDUMP), "-res-usage", "-sass", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _report_of(case: tuple[int, AnyShape, int]) -> Report:
    capability, shape, index = case
    device = REPRESENTATIVE[capability]
    return report(list(launches(shape, device))[index], device, str(shape))


def reports(cases: Iterable[tuple[int, AnyShape]]) -> list[Report]:
    """Compile the kernels of (capability, shape) cases, each once, in a process per core."""
    distinct: dict[str, tuple[int, AnyShape, int]] = {}
    for capability, shape in cases:
        for index, launch in enumerate(launches(shape, REPRESENTATIVE[capability])):
            key = str((capability, launch.kernel.__name__, launch.specialization(), launch.options))
            distinct.setdefault(key, (capability, shape, index))
    # Spawned, not forked: torch has threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=len(os.sched_getaffinity(0)), mp_context=context) as pool:
        return list(pool.map(_report_of, distinct.values()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it with ``--json``; exit 1 if a kernel spills or does not fit."""
    parser = argparse.ArgumentParser(prog="python -m embkern.triton.aot", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--capability", type=int, nargs="+", choices=REPRESENTATIVE, default=list(REPRESENTATIVE)
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    shapes: tuple[AnyShape, ...] = (*SHAPES, *LOSS_SHAPES, *AUTOENCODER_SHAPES, *PACKED_SHAPES, *HEAD_SHAPES)
    rows = reports((capability, shape) for capability in options.capability for shape in shapes)
    print(
        f"{'kernel':24}{'cc':>4}  {'shape':32}{'tile':52}{'regs':>5}{'spills':>7}{'shared':>8}  tensor core"
    )
    for row in rows:
        print(
            f"{row.kernel:24}{row.capability:>4}  {row.shape:32}{row.tile:52}{row.registers:>5}"
            f"{row.spills:>7}{row.shared_bytes:>8}  {row.tensor_core}"
        )
    if options.json:
        content = {"triton": triton.__version__, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    bad = [row for row in rows if row.spills or row.shared_bytes > row.shared_limit]
    print(f"{len(rows)} kernels, {len(bad)} that spill or exceed shared memory")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()

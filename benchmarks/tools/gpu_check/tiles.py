"""Stage 5: hand-picked tiles of three Triton kernels of gather_project, the one in use first.

They differ from it in the number that arithmetic decides least: rows per program, pipeline stages, warps.
`python -m benchmarks tune_gather_project` compares all candidates, where there is more time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from embkern.ops import reference

from ..tune_gather_project import launches
from .kernels import LOOKUPS, Case, Kernel
from .place import Device
from .problems import Problem, Shape, _ids, _normal

if TYPE_CHECKING:
    from embkern.triton.tiles import Tile

SHAPES = {"aligned": LOOKUPS["aligned"]}
# Kernel -> what to change of the tile in use.
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "forward": ({}, dict(num_stages=2), dict(BLOCK_H=128, num_stages=2), dict(BLOCK_N=64, num_stages=3)),
    "project_grad": ({}, dict(num_stages=2), dict(BLOCK_R=256), dict(BLOCK_N=64, num_warps=4)),
    "grad_basis": ({}, dict(BLOCK_N=128, num_stages=2), dict(BLOCK_H=64), dict(BLOCK_R=256)),
}
RESULTS = {"forward": ("out",), "project_grad": ("rows",), "grad_basis": ("grad_basis", "grad_offset")}


def tile_cases(place: Device) -> Iterator[Case]:
    """Yield a case per kernel and tile, in 16 bits."""
    dtype = place.dtypes("triton")[0]
    for kernel, variants in VARIANTS.items():
        for change in variants:
            changed = ", ".join(f"{name} {value}" for name, value in change.items()) or "in use"
            yield Case(
                Kernel(
                    f"{kernel} ({changed})",
                    "gather_project",
                    "triton",
                    tiled,
                    SHAPES,
                    dict(kernel=kernel, change=change),
                ),
                dtype,
                "aligned",
                SHAPES["aligned"][place.rehearsal],
            )


def tile_with(kernel: str, change: dict[str, Any], shape: Shape, dtype: torch.dtype, device: Any) -> Tile:
    """Return the tile in use with some numbers changed, fitted to the rank."""
    from embkern.triton.tiles import fit_rank, tile_of

    tile = replace(tile_of(kernel, device, dtype, shape.N, shape.r, shape.H), **change)
    return fit_rank(tile, shape.r)


def tiled(
    backend: Any,
    shape: Shape,
    dtype: torch.dtype,
    place: Device,
    generator: torch.Generator,
    *,
    kernel: str,
    change: dict[str, Any],
) -> Problem:
    """One kernel of gather_project with one tile: the rows, or the gradient of codes or of basis."""
    from embkern.triton.tiles import describe_device

    N, H, r, V = shape.N, shape.H, shape.r, shape.V
    ids = _ids(generator, N, V)
    floats = (_normal(generator, V, r), _normal(generator, r, H) / r**0.5, _normal(generator, H))
    codes, basis, offset = (each.to(dtype) for each in floats)
    grad = _normal(generator, N, H).to(dtype)
    device = describe_device(codes)
    tile = tile_with(kernel, change, shape, dtype, device)

    def call() -> tuple[torch.Tensor, ...]:
        out = {
            "out": grad.new_empty(N, H),
            "rows": grad.new_empty(N, r, dtype=torch.float32),
            "grad_basis": torch.empty_like(basis),
            "grad_offset": torch.empty_like(offset),
        }
        tensors = dict(ids=ids, codes=codes, basis=basis, offset=offset, grad=grad, **out)
        for launch in launches(kernel, tile, tensors, device):
            launch.run()
        return tuple(out[name] for name in RESULTS[kernel])

    def plain(cast: torch.dtype) -> tuple[torch.Tensor, ...]:
        wide = [each.to(cast) for each in (codes, basis, offset, grad)]
        if kernel == "forward":
            return (reference.gather_project_forward(ids, *wide[:3], 1.0),)
        if kernel == "project_grad":
            rows = wide[3] @ wide[1].t()
            return (rows if cast == torch.float64 else rows.float(),)
        return wide[0][ids].t() @ wide[3], wide[3].sum(0)

    size = dtype.itemsize
    written = {"forward": N * H * size, "project_grad": N * r * 4, "grad_basis": (r + 1) * H * size}[kernel]
    read = {"forward": len(ids.unique()) * r + (r + 1) * H, "project_grad": N * H + r * H}
    elements = read.get(kernel, N * H + len(ids.unique()) * r)
    products = (len(ids.unique()) if kernel == "forward" else N) * r * H
    changing = [ids, codes, basis, offset, grad]
    return Problem(call, plain, changing, 8 * N + elements * size + written, 2.0 * products)

"""Tile sizes of the Triton gather_project kernels: time the candidates, print the entries of the table.

    python -m benchmarks tune_gather_project                                    # on a CUDA device
    python -m benchmarks tune_gather_project --compile-only --capability 90     # anywhere

A candidate is dropped before it is timed if its error exceeds twice plain torch's or if it does not fit the
device. The candidates of a shape class are timed in paired rounds, with CUDA events, over several batches.
The package itself runs nothing of this: the entries printed at the end go into `embkern/triton/tiles.py`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from embkern.experiments.timing import cuda_sampler, paired_rounds

from ..results_file import command_line, write_results

KERNELS = ("forward", "project_grad", "grad_basis")
# The positions that stand for the small and for the large tile in embkern/triton/tiles.py.
LENGTHS = {"few": 16, "many": 16384}
RANKS = {75: 768, 256: 2048, 512: 4096, 640: 2048}
V = 128256
BATCHES = 8


@dataclass(frozen=True)
class Case:
    """A kernel and the shape it is tuned at."""

    kernel: str
    dtype: torch.dtype
    length: str
    r: int

    @property
    def H(self) -> int:  # noqa: N802
        """Columns of the model that has this rank."""
        return RANKS[self.r]

    def __str__(self) -> str:
        """Return it in one line."""
        return f"{self.kernel} {self.length} r={self.r} H={self.H} {str(self.dtype).removeprefix('torch.')}"


def main(arguments: list[str]) -> int:
    """Tune, or with ``--compile-only`` compile; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks tune_gather_project", description=__doc__)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--ranks", type=int, nargs="+", choices=RANKS, default=list(RANKS))
    parser.add_argument(
        "--dtypes", nargs="+", choices=("bfloat16", "float16", "float32"), default=["bfloat16"]
    )
    parser.add_argument("--seconds", type=float, default=450, help="stop after this long, with what is done")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument(
        "--capability", type=int, choices=(80, 90, 100), default=90, help="with --compile-only"
    )
    options = parser.parse_args(arguments)
    cases = [
        Case(kernel, getattr(torch, dtype), length, r)
        for dtype, kernel, length, r in itertools.product(
            options.dtypes, options.kernels, reversed(options.lengths), options.ranks
        )
    ]
    if options.compile_only:
        return _compile(cases, options.capability)
    if not torch.cuda.is_available():
        print(
            "tune_gather_project times kernels and needs a CUDA device; --compile-only does not",
            file=sys.stderr,
        )
        return 2
    command = command_line("tune_gather_project", arguments)
    return _tune(cases, command, time.monotonic() + options.seconds)


def candidates(case: Case, device: Any) -> list[Any]:
    """Return the tiles to compare, the one in use first."""
    from embkern.triton.tiles import TILES, Tile, fit_rank, shared_estimate, tile_of

    N, itemsize = LENGTHS[case.length], case.dtype.itemsize
    on_chip = TILES[case.kernel, itemsize][0].on_chip
    rows: tuple[int, ...] = {"few": (16, 32), "many": (64, 128)}[case.length]
    columns: tuple[int, ...] = (32, 64, 128)
    ranks: tuple[int, ...] = (64, 128, 256)
    warps: tuple[int, ...] = (4, 8)
    if case.kernel == "forward":
        ranks = (64,) if case.r <= on_chip else (64, 128)
    if case.kernel == "project_grad":
        columns = (64,)
    if case.kernel == "grad_basis":
        rows = (32, 64) if case.length == "many" else (16, 32)
        columns, ranks = (64, 128), (64, 128)
    if itemsize > 2:  # registers bound the products of fp32
        rows, columns, ranks, warps = (16, 32, 64), (32, 64), (16, 32, 64), (4,)
    found = [tile_of(case.kernel, device, case.dtype, N, case.r, case.H)]
    for BLOCK_N, BLOCK_H, BLOCK_R, num_warps, num_stages in itertools.product(
        rows, columns, ranks, warps, (2, 3)
    ):
        tile = fit_rank(Tile(BLOCK_N, BLOCK_H, BLOCK_R, num_warps, num_stages, on_chip=on_chip), case.r)
        if tile not in found and shared_estimate(case.kernel, tile, case.r, itemsize) <= device.shared_bytes:
            found.append(tile)
    return found


def launches(kernel: str, tile: Any, tensors: dict[str, Any], device: Any) -> list[Any]:
    """Return the launches of one call of a kernel."""
    from embkern.triton.gather_project.forward import forward_launch
    from embkern.triton.gather_project.grad_basis import grad_basis_launches
    from embkern.triton.gather_project.grad_codes import project_grad_launch

    t = tensors
    if kernel == "forward":
        return [forward_launch(t["ids"], t["codes"], t["basis"], t["offset"], 1.0, t["out"], device, tile)]
    if kernel == "project_grad":
        arguments = (t["grad"], t["ids"], t["codes"], t["basis"], 1.0, -1, t["rows"], device, tile)
        return [project_grad_launch(*arguments)]
    gradients = t["grad_basis"], t["grad_offset"]
    return grad_basis_launches(t["grad"], t["ids"], t["codes"], 1.0, -1, *gradients, device, tile)


def problem(case: Case, device: str) -> dict[str, torch.Tensor]:
    """Return the tensors that the launches of the case read and write."""
    N, r, H = LENGTHS[case.length], case.r, case.H

    def randn(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, device=device) * scale).to(case.dtype)

    tensors = dict(
        ids=torch.randint(V, (N,), device=device),
        codes=randn(V, r),
        basis=randn(r, H, scale=r**-0.5),
        offset=randn(H),
        grad=randn(N, H),
    )
    for name, size, dtype in (
        ("out", (N, H), case.dtype),
        ("rows", (N, r), torch.float32),
        ("grad_basis", (r, H), case.dtype),
        ("grad_offset", (H,), case.dtype),
    ):
        tensors[name] = torch.full(size, float("nan"), dtype=dtype, device=device)
    return tensors


def _compile(cases: list[Case], capability: int) -> int:
    """Compile every candidate and print its report; those that spill or do not fit are marked as dropped."""
    import multiprocessing
    import os
    from concurrent.futures import ProcessPoolExecutor

    jobs = [(case, tile, capability) for case in cases for tile in candidates(case, _target(capability))]
    kept: dict[Case, int] = dict.fromkeys(cases, 0)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=len(os.sched_getaffinity(0)), mp_context=context) as pool:
        for (case, _, _), row in zip(jobs, pool.map(_report, jobs), strict=True):
            dropped = row.spills > 0 or row.shared_bytes > row.shared_limit
            kept[case] += not dropped
            print(
                f"{case!s:44}{row.tile:48}{row.registers:>4} registers{row.spills:>5} spills"
                f"{row.shared_bytes:>8} bytes  {row.tensor_core:8}{'dropped' if dropped else ''}",
                flush=True,
            )
    print(f"{sum(kept.values())} of {len(jobs)} candidates kept for compute capability {capability}")
    return 0 if all(kept.values()) else 1


def _target(capability: int) -> Any:
    from embkern.triton.tiles import REPRESENTATIVE

    return REPRESENTATIVE[capability]


def _report(job: tuple[Case, Any, int]) -> Any:
    from embkern.triton import aot

    case, tile, capability = job
    device = _target(capability)
    return aot.report(launches(case.kernel, tile, problem(case, "meta"), device)[0], device)


def _tune(cases: list[Case], command: str, deadline: float) -> int:
    from embkern.triton.tiles import describe_device

    name = torch.cuda.get_device_name()
    rows: list[dict[str, Any]] = []
    best: list[tuple[Case, Any]] = []
    path = None
    # A stream of its own: the default one cannot be captured in a graph.
    with torch.cuda.stream(torch.cuda.Stream()):
        for case in cases:
            if time.monotonic() > deadline:
                print(f"out of time: {len(cases) - len(best)} of {len(cases)} cases left out")
                break
            torch.manual_seed(0)
            tensors = problem(case, "cuda")
            batches = [tensors | {"ids": torch.randint_like(tensors["ids"], V)} for _ in range(BATCHES)]
            device = describe_device(tensors["codes"])
            samples = {}
            for tile in candidates(case, device):
                if error := _wrong(case, tile, tensors, device):
                    rows.append(_row(case, tile, dropped=error))
                    continue
                calls = [_call(launches(case.kernel, tile, each, device)) for each in batches]
                samples[tile], _ = cuda_sampler(calls)
            if not samples:
                print(f"{case}: no candidate is right", file=sys.stderr)
                return 1
            times = paired_rounds(
                {str(i): s for i, s in enumerate(samples.values())}, seconds=2, repeats=(5, 30)
            )
            medians = {tile: statistics.median(times[str(i)]) for i, tile in enumerate(samples)}
            fastest = min(medians, key=lambda tile: medians[tile])
            best.append((case, replace(fastest, measured_on=name)))
            rows += [_row(case, tile, us=us, chosen=tile == fastest) for tile, us in medians.items()]
            in_use = next(iter(medians))
            print(
                f"{case!s:44}in use {medians[in_use]:8.1f} us   best {medians[fastest]:8.1f} us  {fastest}",
                flush=True,
            )
            path = write_results("tune_gather_project", command, rows)
    print("\n# The fastest, for TILES in embkern/triton/tiles.py:")
    for case, tile in best:
        print(f"# {case}\n{tile},")
    print("->", path)
    return 0


def _call(these: list[Any]) -> Callable[[], None]:
    def run() -> None:
        for launch in these:
            launch.run()

    return run


def _wrong(case: Case, tile: Any, tensors: dict[str, torch.Tensor], device: Any) -> str | None:
    """Return why a candidate is dropped, or None; its error limit is twice plain torch's in its dtype."""
    from triton.runtime.errors import OutOfResources

    result = {"forward": "out", "project_grad": "rows", "grad_basis": "grad_basis"}[case.kernel]
    got = tensors[result].fill_(float("nan"))
    try:
        _call(launches(case.kernel, tile, tensors, device))()
    except OutOfResources as error:
        return str(error)
    exact = _plain(
        case.kernel,
        {key: each.double() for key, each in tensors.items() if each.is_floating_point()},
        tensors["ids"],
    )
    plain = _plain(case.kernel, tensors, tensors["ids"])
    ours, theirs = (float((each.double() - exact).norm() / exact.norm()) for each in (got, plain))
    return None if ours <= 2 * theirs + 1e-7 else f"error {ours:.2e}, plain torch makes {theirs:.2e}"


def _plain(kernel: str, tensors: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    if kernel == "forward":
        return tensors["codes"][ids] @ tensors["basis"] + tensors["offset"]
    if kernel == "project_grad":
        return tensors["grad"] @ tensors["basis"].t()
    return tensors["codes"][ids].t() @ tensors["grad"]


def _row(case: Case, tile: Any, **more: Any) -> dict[str, Any]:
    shape = dict(kernel=case.kernel, length=case.length, N=LENGTHS[case.length], r=case.r, H=case.H)
    return {**shape, "dtype": str(case.dtype), "tile": asdict(tile), **more}

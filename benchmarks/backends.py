"""Every backend of every op on one device, beside plain torch, forward and forward + backward.

The preference in embkern/ops/backends.py follows from this table. Shapes: BERT-base (30522 x 768) at the
paper's ranks, skewed ids (a token stream repeats its frequent tokens).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from embkern.ops import cosine_mse_loss, gather_project
from embkern.ops.backends import BACKENDS, unavailable

from .common import interleaved, write_results

V, H = 30522, 768


def main(arguments: list[str]) -> None:
    """Time all cases and print medians in microseconds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks backends", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rank in (74, 299):
            for count in (1, 16, 128, 1024, 4096):
                providers = _gather_project(rank, count, dtype, options.device)
                _measure("gather_project", dict(rank=rank, N=count), dtype, providers, options, rows)
        for count in (32, 4096):
            providers = _cosine_mse(count, dtype, options.device)
            _measure("cosine_mse", dict(N=count), dtype, providers, options, rows)
    command = " ".join(["python -m benchmarks backends", *arguments])
    print("->", write_results(f"backends_{options.device}", command, rows))


def _measure(
    op: str,
    shape: dict[str, int],
    dtype: torch.dtype,
    providers: dict,
    options: Any,
    rows: list[dict[str, Any]],
) -> None:
    for mode in ("forward", "both"):
        calls = {name: modes[mode] for name, modes in providers.items()}
        times = interleaved(calls, repeats=options.repeats, device=options.device)
        rows.append(
            {
                "op": op,
                **shape,
                "H": H,
                "dtype": str(dtype),
                "mode": mode,
                "device": options.device,
                "us": times,
            }
        )
        medians = "  ".join(f"{name} {each['median']:>9.1f}" for name, each in times.items())
        print(f"{op:15}{str(dtype)[6:]:9}{mode:8}{shape!s:26}{medians}", flush=True)


def _available(op: str, dtype: torch.dtype, device: str) -> list[str]:
    return [name for name in BACKENDS if not unavailable(name, op, device, dtype)]


def _modes(forward: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> dict[str, Callable[[], Any]]:
    def without_grad() -> torch.Tensor:
        with torch.no_grad():
            return forward()

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward().sum(), leaves)

    return {"forward": without_grad, "both": both}


def _gather_project(rank: int, count: int, dtype: torch.dtype, device: str) -> dict[str, dict[str, Callable]]:
    torch.manual_seed(0)
    ids = (torch.rand(count, device=device) ** 4 * V).long()
    codes = torch.randn(V, rank, device=device).to(dtype).requires_grad_()
    basis = torch.randn(rank, H, device=device).to(dtype).requires_grad_()
    offset = torch.randn(H, device=device).to(dtype).requires_grad_()
    leaves = [codes, basis, offset]
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "two-step": lambda: F.embedding(ids, codes) @ basis + offset,
    }
    exact = F.embedding(ids, codes.double()) @ basis.double() + offset.double()
    for name in _available("gather_project", dtype, device):
        calls[name] = lambda name=name: gather_project(ids, codes, basis, offset, backend=name)  # type: ignore[misc]
        _check(calls[name](), calls["two-step"](), exact, name)
    return {name: _modes(call, leaves) for name, call in calls.items()}


def _cosine_mse(count: int, dtype: torch.dtype, device: str) -> dict[str, dict[str, Callable]]:
    torch.manual_seed(0)
    target = torch.randn(count, H, device=device).to(dtype)
    output = torch.randn(count, H, device=device).to(dtype).requires_grad_()

    def plain(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (1 - F.cosine_similarity(y, x)).mean() + F.mse_loss(y, x)

    calls: dict[str, Callable[[], torch.Tensor]] = {"eager": lambda: plain(output, target)}
    exact = plain(output.double(), target.double())
    for name in _available("cosine_mse", dtype, device):
        calls[name] = lambda name=name: cosine_mse_loss(output, target, backend=name)  # type: ignore[misc]
        _check(calls[name](), calls["eager"](), exact, name)
    return {name: _modes(call, [output]) for name, call in calls.items()}


def _check(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, name: str) -> None:
    """No figure for a wrong result."""
    ours, theirs = ((each.double() - exact).norm() / exact.norm() for each in (got, plain))
    assert ours <= 2 * theirs + 1e-6, (
        f"{name}: error {float(ours):.2e}, plain torch makes {float(theirs):.2e}"
    )

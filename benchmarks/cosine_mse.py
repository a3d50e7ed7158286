"""cosine_mse_loss on every backend beside plain torch, forward and forward + backward.

The preference in embkern/ops/backends.py follows from this table. Rows as wide as BERT-base's (768): a batch
of the authors' training (32) and a large one (4096).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from embkern.ops import cosine_mse_loss
from embkern.ops.backends import BACKENDS, unavailable

from .common import RESULTS, interleaved, write_results

H = 768


def main(arguments: list[str]) -> None:
    """Time all cases and print medians in microseconds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks cosine_mse", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the JSON file")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for count in (32, 4096):
            providers = _providers(count, dtype, options.device)
            for mode in ("forward", "both"):
                calls = {name: modes[mode] for name, modes in providers.items()}
                times = interleaved(calls, repeats=options.repeats, device=options.device)
                case = {"op": "cosine_mse", "N": count, "H": H, "dtype": str(dtype), "mode": mode}
                rows.append({**case, "device": options.device, "us": times})
                medians = "  ".join(f"{name} {each['median']:>9.1f}" for name, each in times.items())
                print(f"{str(dtype)[6:]:9}{mode:8} N={count:<6}{medians}", flush=True)
    command = " ".join(["python -m benchmarks cosine_mse", *arguments])
    print("->", write_results(f"cosine_mse_{options.device}", command, rows, directory=options.results))


def _providers(count: int, dtype: torch.dtype, device: str) -> dict[str, dict[str, Callable[[], Any]]]:
    torch.manual_seed(0)
    target = torch.randn(count, H, device=device).to(dtype)
    output = torch.randn(count, H, device=device).to(dtype).requires_grad_()

    def plain(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (1 - F.cosine_similarity(y, x)).mean() + F.mse_loss(y, x)

    calls: dict[str, Callable[[], torch.Tensor]] = {"eager": lambda: plain(output, target)}
    exact = plain(output.detach().double(), target.double())
    for name in BACKENDS:
        if unavailable(name, "cosine_mse", device, dtype):
            continue
        calls[name] = lambda name=name: cosine_mse_loss(output, target, backend=name)  # type: ignore[misc]
        _check(calls[name](), calls["eager"](), exact, name)
    return {name: _modes(call, output) for name, call in calls.items()}


def _modes(loss: Callable[[], torch.Tensor], output: torch.Tensor) -> dict[str, Callable[[], Any]]:
    def without_grad() -> torch.Tensor:
        with torch.no_grad():
            return loss()

    return {"forward": without_grad, "both": lambda: torch.autograd.grad(loss(), output)}


def _check(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, name: str) -> None:
    """No figure for a wrong result."""
    ours, theirs = (float((each.detach().double() - exact).norm() / exact.norm()) for each in (got, plain))
    assert ours <= 2 * theirs + 1e-6, f"{name}: error {ours:.2e}, plain torch makes {theirs:.2e}"

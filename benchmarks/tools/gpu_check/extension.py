"""Stage 0: load an extension that was built elsewhere, or build it here where that one does not run.

`python -m benchmarks.tools.gpu_check.prepare` builds an extension for the device of another machine, into
build/gpu. It runs where torch has the stable ABI and the device the architecture that it was built for.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from embkern.io.atomic import replacing

from .processes import ROOT

CARRIED = ROOT / "build" / "gpu" / "embkern" / "_C.abi3.so"
IN_PLACE = ROOT / "embkern" / "_C.abi3.so"
# Loads the extension and runs one kernel of each op on the device; the reason why not goes to stdout.
CHECK = """
import sys, torch
from embkern.ops import cosine_mse_loss, gather_project
from embkern.ops.backends import unavailable
for op in ("gather_project", "gather_decode", "cosine_mse"):
    if reason := unavailable("native", op, "cuda", torch.bfloat16):
        sys.exit(reason)
ids, codes, basis = torch.tensor([2, 0, 2]).cuda(), torch.randn(3, 16).cuda(), torch.randn(16, 32).cuda()
rows = gather_project(ids, codes, basis, backend="native")
torch.testing.assert_close(rows, codes[ids] @ basis, rtol=1e-4, atol=1e-4)
assert cosine_mse_loss(rows, rows.clone(), backend="native").abs() < 1e-5
print("the extension loads and its CUDA kernels run")
"""


def main(arguments: list[str]) -> int:
    """Return 0 once CUDA kernels of the extension have run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tools.gpu_check.extension", description=__doc__
    )
    parser.add_argument(
        "--extension", type=Path, default=CARRIED, help="built elsewhere (default: %(default)s)"
    )
    parser.add_argument("--limit-seconds", type=float, default=180, help="for the build")
    parser.add_argument("--rehearse", action="store_true", help="compile the emulator's programs instead")
    options = parser.parse_args(arguments)
    if options.rehearse:
        from .stand_in import PROGRAMS, program

        for op in PROGRAMS:
            print(program(op), flush=True)
        return 0
    if options.extension.exists():
        print(f"carried: {options.extension}", flush=True)
        with replacing(IN_PLACE) as temporary:
            shutil.copyfile(options.extension, temporary)
        if _runs():
            return 0
    elif IN_PLACE.exists() and _runs():
        return 0
    return 0 if _build(options.limit_seconds) and _runs() else 1


def _runs() -> bool:
    return subprocess.run([sys.executable, "-c", CHECK], cwd=ROOT).returncode == 0


def _build(limit: float) -> bool:
    import torch

    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    variables = {"TORCH_CUDA_ARCH_LIST": capability, **os.environ, "EMBKERN_NATIVE": "1"}
    print(f"building from source for compute capability {capability}", flush=True)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    try:
        return subprocess.run(command, cwd=ROOT, env=variables, timeout=limit).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"the build did not end in {limit:.0f} s", flush=True)
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Stage 0: load the extension that `prepare` built elsewhere, or the one that is in place, and run kernels.

The carried extension in build/gpu runs where torch has the stable ABI and the device the architecture that it
was built for. It is copied into the package.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from embkern.io.atomic import replacing

from .processes import ROOT

CARRIED = ROOT / "build" / "gpu" / "embkern" / "_C.abi3.so"
IN_PLACE = ROOT / "embkern" / "_C.abi3.so"
# Loads the extension and runs kernels of three ops on the device; the reason why not goes to stderr.
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
# In a rehearsal: the extension loads, and registers CUDA kernels, which nothing here can run.
LOAD = """
import sys, torch
import embkern.ops  # defines the ops
torch.ops.load_library(sys.argv[1])
missing = [op for op in ("gather_project_forward", "gather_decode_forward", "cosine_mse_forward")
           if not torch._C._dispatch_has_kernel_for_dispatch_key(f"embkern::{op}.native", "CUDA")]
print("it loads;", f"no CUDA kernel of {missing}" if missing else "its CUDA kernels are registered")
sys.exit(bool(missing))
"""


def main(arguments: list[str]) -> int:
    """Return 0 once CUDA kernels of the extension have run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tools.gpu_check.extension", description=__doc__
    )
    parser.add_argument(
        "--extension", type=Path, default=CARRIED, help="built elsewhere (default: %(default)s)"
    )
    parser.add_argument("--rehearse", action="store_true", help="load it, compile the emulator's programs")
    options = parser.parse_args(arguments)
    if options.rehearse:
        return _rehearse(options.extension)
    if options.extension.exists():
        print(f"carried: {options.extension}", flush=True)
        with replacing(IN_PLACE) as temporary:
            shutil.copyfile(options.extension, temporary)
    elif not IN_PLACE.exists():
        print(f"neither {options.extension} nor {IN_PLACE} exists")
        return 1
    return runs()


def runs() -> int:
    """Run the check in another process; return its exit status."""
    return subprocess.run([sys.executable, "-c", CHECK], cwd=ROOT).returncode


def _rehearse(extension: Path) -> int:
    import torch

    from .stand_in import PROGRAMS, program

    for op in PROGRAMS:
        print(program(op), flush=True)
    if torch.version.cuda is None or not extension.exists():
        print("not loaded: no extension is carried, or this torch is no CUDA build")
        return 0
    return subprocess.run([sys.executable, "-c", LOAD, str(extension)], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

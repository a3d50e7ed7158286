"""Stage 7: build the extension from source for this device, and run kernels of it.

It comes first where no extension that was built elsewhere runs. A rehearsal compiles one source.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from .extension import runs
from .processes import ROOT

REHEARSED = "csrc/cpu/ops/poison_memory.cpp"
FOLDER = ROOT / "build" / "gpu_check"


def main(arguments: list[str]) -> int:
    """Return 0 once CUDA kernels of the new extension have run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools.gpu_check.build", description=__doc__)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(arguments)
    if options.rehearse:
        return _compile_one()
    import torch

    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    variables = {"TORCH_CUDA_ARCH_LIST": capability, **os.environ, "EMBKERN_NATIVE": "1"}
    print(f"building from source for compute capability {capability}", flush=True)
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--build-temp", str(FOLDER / "temp")]
    return subprocess.run(command, cwd=ROOT, env=variables).returncode or runs()


def _compile_one() -> int:
    import sysconfig

    from torch.utils.cpp_extension import include_paths

    FOLDER.mkdir(parents=True, exist_ok=True)
    folders = [*include_paths(), str(ROOT / "csrc"), sysconfig.get_path("include")]
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-fPIC", "-O1"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000"]
    command += [f"-I{each}" for each in folders]
    return subprocess.run([*command, "-c", REHEARSED, "-o", str(FOLDER / "one.o")], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

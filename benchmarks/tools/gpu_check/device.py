"""Stage 0: versions, the device, and its two ceilings: the rates of copies and of products."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from embkern.experiments.environment import environment, version_of

from ...machine import copy_bandwidth, gemm_peak
from ...runner import DTYPES
from .lines import ENVIRONMENT, append

NO_DEVICE = 2  # exit status
PACKAGES = ("numpy", "pytest", "pytest-xdist", "pydantic", "safetensors", "transformers")


def main(arguments: list[str]) -> int:
    """Print and write the record of the device; return NO_DEVICE where torch sees none."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools.gpu_check.device", description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="a line is appended")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(arguments)
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}", flush=True)
    if not options.rehearse and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA device; run this on a machine that has one")
        return NO_DEVICE
    found = environment()
    found["packages"] = {name: version_of(name) for name in PACKAGES}
    found["device"] = "rehearsal" if options.rehearse else torch.cuda.get_device_name()
    for name, value in found.items():
        print(f"{name:16} {value}", flush=True)
    kind = "cpu" if options.rehearse else "cuda"
    dtypes = ("fp32",) if options.rehearse else ("bf16", "fp32")
    append(options.results, {ENVIRONMENT: found})  # now, because the measurements below may fail
    found["copy_gbps"] = round(copy_bandwidth(kind), 1)
    print(f"copy             {found['copy_gbps']:.0f} GB/s, read and written", flush=True)
    found["gflops"] = {}
    for name in dtypes:
        found["gflops"][name] = round(gemm_peak(DTYPES[name], kind), 1)
        print(f"product {name:8} {found['gflops'][name] / 1e3:.1f} TFLOP/s", flush=True)
    append(options.results, {ENVIRONMENT: found})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

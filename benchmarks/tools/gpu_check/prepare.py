"""The preparation for an H100 or H200, on a machine with nvcc and a CUDA build of torch.

    python -m benchmarks.tools.gpu_check.prepare [--no-extension] [--no-wheels] [--no-kernels] [--only NAME]

Builds the extension for sm_90 into build/gpu, where `gpu_check` finds it (the ABI is stable, so torch may be
older here than on the device's machine); downloads packages that may be missing there into build/gpu/wheels;
and compiles every Triton kernel of stages 1 and 5 at its shapes with the installed Triton. Failures and
spilled registers are printed and make the exit status 1. build/gpu is what has to be copied to the device's
machine beside the checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from embkern.ops import backends
from embkern.triton.launch import Launch
from embkern.triton.tiles import REPRESENTATIVE

from ...machine import first_line
from .kernels import Case, cases
from .packages import WHEELS, download
from .place import Device
from .processes import ROOT
from .tiles import tile_cases

BUILD = ROOT / "build" / "gpu"
TEMPORARY = ROOT / "build" / "gpu_temp"
CAPABILITY = 90
# The device's machine, for the wheels.
PYTHON = "3.12"
PLATFORMS = (*(f"manylinux_2_{glibc}_x86_64" for glibc in (28, 27, 26, 24, 17)), "manylinux2014_x86_64")
MOST_BYTES = 64 * 2**20  # of what is carried


def main(arguments: list[str]) -> int:
    """Build and compile; return 0 if nothing failed or spilled."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools.gpu_check.prepare", description=__doc__)
    parser.add_argument("--only", default="", help="a part of the names of the kernels to compile")
    parser.add_argument("--no-extension", action="store_true")
    parser.add_argument("--no-wheels", action="store_true")
    parser.add_argument("--no-kernels", action="store_true")
    parser.add_argument("--python", default=PYTHON, help="version of the device's machine, for the wheels")
    options = parser.parse_args(arguments)
    built = options.no_extension or build_extension()
    downloaded = options.no_wheels or download(WHEELS, ROOT / "constraints.txt", options.python, PLATFORMS)
    carried = sum(path.stat().st_size for path in BUILD.rglob("*") if path.is_file())
    print(f"{BUILD.relative_to(ROOT)}: {carried / 2**20:.1f} MiB", flush=True)
    fits = carried <= MOST_BYTES
    if not fits:
        print(f"that is more than {MOST_BYTES / 2**20:.0f} MiB")
    compiled = options.no_kernels or compile_kernels(options.only)
    return 0 if fits and built and downloaded and compiled else 1


def build_extension() -> bool:
    """Build the extension for one architecture into build/gpu; return whether that worked."""
    if torch.version.cuda is None:
        print(f"the extension needs a CUDA build of torch, {torch.__version__} is none")
        return False
    variables = os.environ | {
        "EMBKERN_NATIVE": "1",
        "TORCH_CUDA_ARCH_LIST": f"{CAPABILITY // 10}.{CAPABILITY % 10}",
        "LDFLAGS": "-Wl,--strip-debug",  # smaller to copy
    }
    folders = ["--build-temp", str(TEMPORARY), "--build-lib", str(BUILD)]
    command = [sys.executable, "setup.py", "-q", "build_ext", *folders]
    built = subprocess.run(command, cwd=ROOT, env=variables).returncode == 0
    for path in BUILD.glob("embkern/*.so"):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 2**20:.1f} MiB, torch {torch.__version__}")
    return built


def compile_kernels(only: str = "") -> bool:
    """Compile what stage 1 launches; return whether nothing failed or spilled."""
    import triton

    start = time.monotonic()
    names = [case.name for case in _cases() if only in case.name]
    print(f"{len(names)} cases, Triton {triton.__version__}, compute capability {CAPABILITY}", flush=True)
    context = multiprocessing.get_context("spawn")  # a fork would copy the state of torch's threads
    seen: dict[str, bool] = {}
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        for made in pool.map(_compile, names):
            for key, line, good in made:
                if key not in seen:
                    print(line, flush=True)
                seen[key] = good
    bad = sum(not good for good in seen.values())
    print(f"{len(seen)} kernels, {bad} that fail, spill or do not fit, {time.monotonic() - start:.0f} s")
    return bad == 0


def _cases() -> Iterator[Case]:
    place = _Recorder()
    found = (*cases(place), *tile_cases(place))
    return (case for case in found if case.kernel.backend == "triton")


class _Recorder(Device):
    """The shapes and dtypes of a device on CPU tensors, whose addresses are aligned alike."""

    type = "cpu"


def recorded_launches(case: Case, place: Device | None = None) -> list[Launch]:
    """Return the launches of a case, at its shape on a device unless another place says otherwise.

    None of them runs. What is launched does not depend on the values of tensors, only on shapes, strides and
    addresses.
    """
    launches: list[Launch] = []
    with (
        _set(Launch, "run", lambda launch: launches.append(launch)),
        _set(backends, "_triton_unavailable", lambda *_: None),
    ):
        backends.forget()
        case.problem(place or _Recorder()).call()
    return launches


@contextlib.contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute within a block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
        backends.forget()


def _compile(name: str) -> list[tuple[str, str, bool]]:
    """Compile one case's launches: what tells each from others, a line about it, and whether it is good."""
    from embkern.triton.aot import report

    torch.set_num_threads(1)
    (case,) = (each for each in _cases() if each.name == name)
    made = []
    for launch in recorded_launches(case):
        key = str((launch.kernel.__name__, launch.specialization(), launch.options))
        what = f"{launch.kernel.__name__:24}{name:46}"
        try:
            row = report(launch, REPRESENTATIVE[CAPABILITY], name)
        except Exception as error:  # the other kernels are compiled too
            made.append((key, f"{what}FAILS {first_line(error)}", False))
            continue
        good = not row.spills and row.shared_bytes <= row.shared_limit
        line = f"{what}{row.registers:4} registers{row.shared_bytes:8} bytes shared  {row.tensor_core}"
        line += f"  SPILLS {row.spills}" if row.spills else "" if good else "  DOES NOT FIT"
        made.append((key, line, good))
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

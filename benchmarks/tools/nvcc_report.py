"""Report on every CUDA kernel as nvcc compiles it: registers, spills, stack, shared memory, instructions.

    python -m benchmarks.tools.nvcc_report [--arch sm_90 ...] [--json PATH]

Needs nvcc (from CUDA_HOME or PATH), not a GPU, nor a CUDA build of torch. Instructions are counted in the
SASS where a cuobjdump is found (the toolkit's, or the one that comes with triton). Exits with 1 if a kernel
spills.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# Prefixes of SASS opcodes: tensor cores, ldmatrix, cp.async, loads from shared memory, 16-byte loads and
# stores, local memory, atomics.
INSTRUCTIONS = ("HMMA", "LDSM", "LDGSTS", "LDS.", "LDG.E.128", "STG.E.128", "LDL", "STL", "ATOM", "RED.")


@dataclass
class Kernel:
    """One kernel as compiled for one architecture; sizes in bytes, shared memory without the dynamic part."""

    source: str
    architecture: str
    name: str
    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    stack: int = 0
    static_shared: int = 0
    instructions: dict[str, int] = field(default_factory=dict)


def find_nvcc() -> str | None:
    """Return the nvcc of CUDA_HOME, else the one on PATH, else None."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def find_cuobjdump() -> str | None:
    """Return a cuobjdump from PATH or from the installed triton, else None."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    folders = (triton and triton.submodule_search_locations) or []
    bundled = [Path(folder) / "backends/nvidia/bin/cuobjdump" for folder in folders]
    return next((str(each) for each in bundled if each.exists()), None)


def compile_source(source: Path, architecture: str) -> list[Kernel]:
    """Compile ``source`` as setup.py does, for one architecture, and return its kernels."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc not found: set CUDA_HOME or PATH")
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "kernels.o"  # with the host's code, where nvcc may stumble too
        command = [nvcc, "-c", f"-arch={architecture}", "-std=c++17", "-O3", "-Xptxas", "-v"]
        command += [*COMMON_NVCC_FLAGS, "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        command += [f"-I{each}" for each in (ROOT / "csrc", *include_paths())]
        done = subprocess.run([*command, str(source), "-o", str(compiled)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        kernels = _resources(done.stdout + done.stderr, source.name, architecture)
        if cuobjdump := find_cuobjdump():
            _count_instructions(kernels, cuobjdump, compiled)
    names = _readable([kernel.name for kernel in kernels])
    for kernel, name in zip(kernels, names, strict=True):
        kernel.name = name
    return kernels


def _resources(ptxas: str, source: str, architecture: str) -> list[Kernel]:
    kernels: list[Kernel] = []
    for line in ptxas.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)'", line):
            kernels.append(Kernel(source, architecture, found[1]))
        elif found := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", line
        ):
            kernels[-1].stack, kernels[-1].spill_stores, kernels[-1].spill_loads = map(int, found.groups())
        elif found := re.search(r"Used (\d+) registers", line):
            kernels[-1].registers = int(found[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[-1].static_shared = int(shared[1]) if shared else 0
    return kernels


def _count_instructions(kernels: list[Kernel], cuobjdump: str, compiled: Path) -> None:
    sass = subprocess.run([cuobjdump, "-sass", compiled], capture_output=True, text=True, check=True).stdout
    functions = re.split(r"Function : (\S+)", sass)[1:]
    for name, body in zip(functions[::2], functions[1::2], strict=True):
        opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)", body, re.MULTILINE)
        counts = Counter(prefix for opcode in opcodes for prefix in INSTRUCTIONS if opcode.startswith(prefix))
        for kernel in kernels:
            if kernel.name == name:
                kernel.instructions = {prefix: counts[prefix] for prefix in INSTRUCTIONS}


def _readable(names: list[str]) -> list[str]:
    """Demangle where a demangler is found, and leave out the namespaces and the parameters."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return names
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"^void |\(.*$|\b[a-z_0-9]+::", "", line) for line in text.splitlines()]


def report(architectures: tuple[str, ...] = ARCHITECTURES) -> list[Kernel]:
    """Compile every CUDA source for every architecture, as many at a time as there are processors."""
    jobs = [(source, architecture) for source in SOURCES for architecture in architectures]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [kernel for kernels in pool.map(lambda job: compile_source(*job), jobs) for kernel in kernels]


def main(argv: list[str]) -> int:
    """Print the table; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools.nvcc_report", description=__doc__)
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, help="such as sm_90")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the table there too")
    arguments = parser.parse_args(argv)
    if find_nvcc() is None:
        print("nvcc not found: set CUDA_HOME or PATH", file=sys.stderr)
        return 2
    kernels = report(tuple(arguments.arch))
    width = max(len(kernel.name) for kernel in kernels)
    print(f"{'kernel':{width}} arch    registers spills stack shared", *INSTRUCTIONS)
    for kernel in kernels:
        counts = (f"{kernel.instructions.get(each, '?'):>{len(each)}}" for each in INSTRUCTIONS)
        print(
            f"{kernel.name:{width}} {kernel.architecture:7} {kernel.registers:9} "
            f"{kernel.spill_stores + kernel.spill_loads:6} {kernel.stack:5} {kernel.static_shared:6}",
            *counts,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(kernel) for kernel in kernels], indent=1) + "\n")
    return int(any(kernel.spill_stores + kernel.spill_loads for kernel in kernels))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

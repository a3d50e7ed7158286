"""Compiles the C++ sources of this benchmark with the compiler at hand."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
# Flags of the compiler, and of /proc/cpuinfo, per instruction set; each has those of the ones before it.
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {
    "avx2": ("avx2", "fma", "f16c", "bmi2"),
    "avx512": _AVX512,
    "avx512_vnni": ("avx512_vnni",),
    "avx512_vbmi": ("avx512vbmi", "avx512_vbmi2", "gfni"),
}


def available_sets() -> dict[str, tuple[str, ...]]:
    """Return the instruction sets that this processor has, with the compiler's flags of each."""
    cpuinfo = Path("/proc/cpuinfo")
    known = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set[str]()
    found, flags = dict[str, tuple[str, ...]](), tuple[str, ...]()
    for name, own in INSTRUCTION_SETS.items():
        if not known.issuperset(own):
            break
        flags = (*flags, *(f"-m{flag.replace('_', '')}" for flag in own))
        found[name] = flags
    return found


@functools.cache
def compiled(source: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    """Return the library of ``native/SOURCE``, compiled with these flags for this process.

    Raises:
        RuntimeError: there is no C++ compiler (``CXX``, g++ or clang++), or it failed.
    """
    names = [os.environ.get("CXX"), "g++", "clang++"]
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError("expected a C++ compiler (CXX, g++ or clang++), found none")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "library.so"
        command = [compiler, "-O3", "-std=c++17", "-shared", "-fPIC", *flags, str(SOURCES / source)]
        done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        return ctypes.CDLL(str(library))


def is_x86() -> bool:
    """Return whether the decoders, which are written for x86-64, can be compiled."""
    return platform.machine() in ("x86_64", "AMD64")

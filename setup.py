"""Builds the optional native extension; every other setting is in pyproject.toml.

EMBKERN_NATIVE=0  install in pure Python, ask for no compiler
EMBKERN_NATIVE=1  fail if the extension cannot be built
unset             build it if possible, else say why not once and install in pure Python
EMBKERN_SANITIZE=1  build with AddressSanitizer and UBSan (see `make sanitize`)

CUDA sources are compiled when torch itself is a CUDA build and a toolkit is found; no device is asked.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

NATIVE = os.environ.get("EMBKERN_NATIVE", "")
if NATIVE not in ("", "0", "1"):
    sys.exit(f"EMBKERN_NATIVE: expected 0, 1 or unset, got {NATIVE!r}")


def extension() -> dict:
    """Return setup()'s ext_modules and cmdclass for the native extension."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    class OptionalBuildExtension(BuildExtension):
        """Turns a failed build into a pure-Python install unless EMBKERN_NATIVE=1."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if NATIVE == "1":
                    raise
                without_native(f"building the extension failed: {error}")
                self.extensions: list = []

    sources = [Path("csrc/registration.cpp"), *sorted(Path("csrc/cpu").glob("*.cpp"))]
    cuda_sources = sorted(Path("csrc/cuda").glob("*.cu"))
    use_cuda = bool(cuda_sources and torch.version.cuda and CUDA_HOME)
    if use_cuda:
        # Unset, torch asks the device that happens to be there, or targets sm_75, which has no cp.async.
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;8.6;8.9;9.0;10.0;12.0+PTX")
    # Torch 2.10 is the oldest stable ABI with parallel_for; one wheel then serves every torch >= 2.10.
    defines: list = [("TORCH_TARGET_VERSION", "0x020a000000000000")]
    optimise = ["/O2"] if os.name == "nt" else ["-O3", "-Wall"]
    sanitize: list = []
    if os.environ.get("EMBKERN_SANITIZE") == "1":
        optimise = ["-O1", "-g", "-Wall"]
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    module = (CUDAExtension if use_cuda else CppExtension)(
        "embkern._C",
        sources=[str(path) for path in sources + (cuda_sources if use_cuda else [])],
        include_dirs=[str(Path("csrc").resolve())],
        define_macros=defines + ([("USE_CUDA", None)] if use_cuda else []),
        extra_compile_args={"cxx": optimise + sanitize} | ({"nvcc": ["-O3"]} if use_cuda else {}),
        extra_link_args=sanitize,
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": OptionalBuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def without_native(reason: str) -> None:
    """Say once that the install goes on in pure Python, and how to change that."""
    print(
        f"embkern: installing without native kernels ({reason}). Everything works on the torch backend; "
        "set EMBKERN_NATIVE=1 to make this an error.",
        file=sys.stderr,
    )


if NATIVE == "0":
    arguments: dict = {}
else:
    try:
        arguments = extension()
    except ImportError as error:
        if NATIVE == "1":
            raise
        without_native(f"{error}; torch must be installed first, then pip install --no-build-isolation")
        arguments = {}

setup(**arguments)

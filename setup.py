"""Builds the optional native extension; every other setting is in pyproject.toml.

EMBKERN_NATIVE=0  install in pure Python, ask for no compiler
EMBKERN_NATIVE=1  fail if the extension cannot be built
unset             build it if possible, else say why not once and install in pure Python
EMBKERN_SANITIZE=1  build with AddressSanitizer and UBSan (see `make sanitize`)

CUDA sources are compiled when torch itself is a CUDA build and a toolkit of the same major version is found;
no device is asked.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import setup

# pyproject.toml asks for it, but pip does not look there with --no-build-isolation; an older setuptools fails
# over the form of the license and does not say why.
OLDEST_SETUPTOOLS = 77
if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    sys.exit(
        f"embkern: expected setuptools>={OLDEST_SETUPTOOLS}, got {setuptools.__version__}; "
        f'run: pip install "setuptools>={OLDEST_SETUPTOOLS}"'
    )

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

    sources = [Path("csrc/registration.cpp"), *sorted(Path("csrc/cpu").rglob("*.cpp"))]
    cuda_sources = sorted(Path("csrc/cuda").glob("*.cu"))
    built_with = torch.version.cuda
    use_cuda = False
    if cuda_sources and built_with and CUDA_HOME:
        toolkit = toolkit_version(CUDA_HOME)
        use_cuda = toolkit.split(".")[0] == built_with.split(".")[0]
        if not use_cuda:  # torch would refuse to build anything; the CPU's kernels do not need the toolkit
            print(
                f"embkern: building without CUDA kernels (the toolkit in {CUDA_HOME} is CUDA {toolkit}, "
                f"torch was built with CUDA {built_with}); other kernels do not need it.",
                file=sys.stderr,
            )
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


def toolkit_version(home: str) -> str:
    """Return the release of the CUDA toolkit in ``home``, such as 13.0; "unknown" if nvcc does not say."""
    try:
        printed = subprocess.check_output([Path(home) / "bin" / "nvcc", "--version"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    release = re.search(r"release (\d+\.\d+)", printed)
    return release[1] if release else "unknown"


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

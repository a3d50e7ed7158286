"""Stage 0: install the carried wheels of packages that this machine lacks, with no network, into build/.

`prepare` downloads them. A package that is installed already stays as it is.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from .processes import ROOT

WHEELS = ROOT / "build" / "gpu" / "wheels"
SITE = ROOT / "build" / "gpu_site"  # on PYTHONPATH in all later stages
# What the tests of a device import beyond the kernels, with what these need themselves.
NEEDED = ("pydantic", "pytest", "pytest-xdist", "safetensors", "typer", "rich", "tqdm", "pyyaml")


def main(arguments: list[str]) -> int:
    """Install; return 0 if every carried package can be imported afterwards."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tools.gpu_check.packages", description=__doc__
    )
    parser.add_argument("--wheels", type=Path, default=WHEELS, help="default: %(default)s")
    parser.add_argument("--target", type=Path, default=SITE, help="default: %(default)s")
    parser.add_argument("--rehearse", action="store_true", help="the same")
    options = parser.parse_args(arguments)
    shutil.rmtree(options.target, ignore_errors=True)
    carried = {name_of(path): path for path in sorted(options.wheels.glob("*.whl"))}
    missing = {name: path for name, path in carried.items() if not installed(name)}
    print(f"{len(carried)} wheels carried, missing here: {', '.join(missing) or 'none'}", flush=True)
    if not missing:
        return 0
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--disable-pip-version-check", "--target", str(options.target), *map(str, missing.values())]
    return subprocess.run(command).returncode


def name_of(wheel: Path) -> str:
    """Return the normalised name of a wheel's distribution."""
    return re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()


def installed(name: str) -> bool:
    """Return whether a distribution is installed, anywhere."""
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def download(folder: Path, constraints: Path, python: str, platforms: tuple[str, ...]) -> bool:
    """Download the wheels of NEEDED for another machine; return whether that worked."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    command += [part for each in platforms for part in ("--platform", each)]
    command += ["--constraint", str(constraints), "--dest", str(folder), *NEEDED]
    return subprocess.run(command).returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Installing: from an sdist and a wheel, without a compiler, and when one is demanded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


FILES = (
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "MANIFEST.in",
    "csrc",
    "embkern",
    "tests",
    "benchmarks",
)


def copy_of_sources(target: Path) -> Path:
    """A copy of the sources with nothing built."""
    target.mkdir()
    for name in FILES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture
def checkout(tmp_path) -> Path:
    return copy_of_sources(tmp_path / "checkout")


def pip(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def install(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    options = ("--no-build-isolation", "--no-deps", "--verbose", "--target", checkout.parent / "site")
    return pip("install", *options, checkout, **environment)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """An sdist of the sources, and a wheel with native kernels made of nothing but that sdist."""
    folder = tmp_path_factory.mktemp("distributions")
    sources = copy_of_sources(folder / "checkout")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, folder], cwd=sources, check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    options = ("--no-build-isolation", "--no-deps", "--wheel-dir", folder)
    made = pip("wheel", *options, sdist, EMBKERN_NATIVE="1")
    assert made.returncode == 0, made.stderr
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def import_installed(site: Path, script: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n{script}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=site.parent)


USE = """
import torch
assert "embkern" in sys.modules, "torch calls the entry point, so that compressed models load"
import embkern
from embkern.ops import gather_project, cosine_mse_loss
assert embkern.__file__.startswith(sys.path[0]), embkern.__file__
for _ in range(3):
    x = torch.randn(4, 3, requires_grad=True)
    rows = gather_project(torch.tensor([1, 2]), x, torch.randn(3, 5))
    cosine_mse_loss(rows, torch.randn(2, 5)).backward()
assert x.grad.shape == x.shape
"""


def test_without_a_compiler_everything_works_on_torch_and_is_said_once(checkout):
    done = install(checkout, CC="/bin/false", CXX="/bin/false")
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("embkern: installing without native kernels") == 1
    assert not list((checkout.parent / "site" / "embkern").glob("_C*"))
    used = import_installed(checkout.parent / "site", USE)
    assert used.returncode == 0, used.stderr
    assert used.stderr.count("falling back to the torch backend: the native extension is not built") == 1


def test_native_can_be_declined_and_demanded(checkout):
    assert install(checkout, EMBKERN_NATIVE="1", CC="/bin/false", CXX="/bin/false").returncode != 0
    assert install(checkout, EMBKERN_NATIVE="yes").returncode != 0
    assert install(checkout, EMBKERN_NATIVE="0").returncode == 0
    assert not list((checkout.parent / "site" / "embkern").glob("_C*"))


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_wheel_of_the_sdist_has_the_native_kernels(distributions, tmp_path):
    _, wheel = distributions
    assert "-cp310-abi3-" in wheel.name, "one wheel serves every Python from 3.10 on"
    done = pip("install", "--no-deps", "--target", tmp_path / "site", wheel)
    assert done.returncode == 0, done.stderr
    loaded = "from embkern.ops.library import load_native\nassert load_native() is None, load_native()"
    used = import_installed(tmp_path / "site", USE + loaded)
    assert used.returncode == 0, used.stderr
    assert used.stderr == ""


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_sdist_has_all_sources_and_the_wheel_the_package_alone(distributions):
    sdist, wheel = distributions
    with tarfile.open(sdist) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    assert {"csrc/registration.cpp", "csrc/cuda/gather_project.cu", "tests/conftest.py", "LICENSE"} <= inside
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    packaged = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert {name.split("/")[0] for name in packaged} == {"embkern"}
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "embkern").rglob("*") if path.is_file()}
    here = {name for name in here if "__pycache__" not in name and not name.endswith((".so", ".pyd"))}
    assert packaged - here == {"embkern/_C.abi3.so"}
    assert here <= packaged, "every module and data file"

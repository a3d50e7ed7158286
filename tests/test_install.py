"""Installing: with a compiler, without one, and when one is demanded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the sources with nothing built."""
    target = tmp_path / "checkout"
    target.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "embkern"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, target / name)
    return target


def install(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--verbose",
        "--quiet",
    ]
    return subprocess.run(
        [
            *command[:-1],
            "--disable-pip-version-check",
            "--target",
            str(checkout.parent / "site"),
            str(checkout),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def import_installed(checkout: Path, script: str) -> subprocess.CompletedProcess[str]:
    site = str(checkout.parent / "site")
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {site!r})\n{script}"],
        capture_output=True,
        text=True,
        cwd=checkout.parent,
    )


USE = """
import torch, embkern
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
    used = import_installed(checkout, USE)
    assert used.returncode == 0, used.stderr
    assert used.stderr.count("falling back to the torch backend: the native extension is not built") == 1


def test_native_can_be_declined_and_demanded(checkout):
    assert install(checkout, EMBKERN_NATIVE="1", CC="/bin/false", CXX="/bin/false").returncode != 0
    assert install(checkout, EMBKERN_NATIVE="yes").returncode != 0
    assert install(checkout, EMBKERN_NATIVE="0").returncode == 0
    assert not list((checkout.parent / "site" / "embkern").glob("_C*"))


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_regular_install_has_the_native_kernels(checkout):
    done = install(checkout, EMBKERN_NATIVE="1")
    assert done.returncode == 0, done.stderr
    used = import_installed(
        checkout,
        USE + "from embkern.ops.library import load_native\nassert load_native() is None, load_native()",
    )
    assert used.returncode == 0, used.stderr
    assert used.stderr == ""

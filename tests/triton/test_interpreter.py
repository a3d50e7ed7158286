"""Runs each interpreted*.py in a process where Triton interprets its kernels on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

FOLDER = Path(__file__).parent


def _interpreter_fails() -> bool:
    """Triton 3.6 takes ``int`` of an array with one element, which NumPy 2.4 refuses."""
    if tuple(map(int, triton.__version__.split(".")[:2])) > (3, 6):
        return False
    return tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4)


@pytest.mark.skipif(_interpreter_fails(), reason="the interpreter of Triton 3.6 does not run with NumPy 2.4")
@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("interpreted*.py")))
def test_the_kernels_under_the_interpreter(name):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / name)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert ran.returncode == 0, f"{ran.stdout[-8000:]}\n{ran.stderr[-2000:]}"

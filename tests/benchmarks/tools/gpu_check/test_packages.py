"""Carried wheels: what is missing is installed without a network, what is there stays as it is."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.tools.gpu_check import packages, run


def wheel(folder: Path, name: str) -> None:
    info = f"{name}-1.0.dist-info"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", "ANSWER = 42")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.mark.parametrize("names", [("not_there_at_all",), ()])
def test_only_missing_packages_are_installed(tmp_path, monkeypatch, capfd, names):
    pip = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True)
    if names and pip.returncode:
        pytest.skip("this Python has no pip")
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    for name in (*names, "torch"):
        wheel(wheels, name)
    (site / "stale").mkdir(parents=True)
    assert packages.main(["--wheels", str(wheels), "--target", str(site)]) == 0
    missing = ", ".join(name.replace("_", "-") for name in names) or "none"
    assert f"{1 + len(names)} wheels carried, missing here: {missing}" in capfd.readouterr().out
    assert not (site / "stale").exists()
    assert not (site / "torch").exists()
    monkeypatch.setattr(run, "SITE", site)
    assert run.installed("not_there_at_all") == bool(names)
    code = "import not_there_at_all; print(not_there_at_all.ANSWER)"
    if names:
        path = run._variables(tmp_path, False)["PYTHONPATH"]
        ran = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True)
        assert ran.stdout == b"42\n"


def test_without_wheels_nothing_is_done(tmp_path, capsys):
    assert packages.main(["--wheels", str(tmp_path), "--target", str(tmp_path / "site")]) == 0
    assert "0 wheels carried, missing here: none" in capsys.readouterr().out


def test_names_of_wheels_are_normalised():
    assert packages.name_of(Path("Pydantic_core-2.50.5-cp312-cp312-x.whl")) == "pydantic-core"

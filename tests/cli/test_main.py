"""The command line: results, exit codes and errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("transformers")

import embkern
from embkern.cli import main as cli
from embkern.io.mapped_table import TableFile
from embkern.methods import autoencoder
from embkern.methods.sharded import World
from embkern.tables.factors import Factors
from tests.example_models import build, word_tokenizer


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "embkern", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "dense"
    build("bert").save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


def shown_by(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """Return what a command prints; it runs in this process, as starting another one takes seconds."""
    monkeypatch.setattr(sys, "argv", ["embkern", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr()
    assert end.value.code in (0, None), shown.err
    return shown.out


def test_compress_shows_a_table_and_how_to_use_the_result(dense, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    shown = shown_by(monkeypatch, capsys, "compress", dense, "-o", "out", "--ratio", 2)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    assert shown.index("model") < shown.index("direction error")
    assert "smaller" in next(line for line in lines if line.startswith("│ model"))
    scope: dict = {}
    exec("\n".join(lines[-2:]), scope)
    assert type(scope["model"].get_input_embeddings()).__name__ == "PackedEmbedding"
    inspected = shown_by(monkeypatch, capsys, "inspect", "out")
    for part in ("worst rows", "rows at", "compressed from dense"):
        assert part in inspected


def test_compress_evaluate_inspect_export(dense, tmp_path, monkeypatch, capsys):
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

    def shown(*arguments: object) -> str:
        return shown_by(monkeypatch, capsys, *arguments)

    evaluated = json.loads(shown("evaluate", "table", out, "--against", dense, "--text", text, "--json"))
    assert evaluated["table"]["rmse"] == pytest.approx(report["table"]["rmse"])
    assert "nearest neighbours kept" in shown("evaluate", "table", out, "--against", dense)
    assert "rank 4" in shown("inspect", out)
    shown("export", out, "--format", "dense", "-o", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").exists()


def test_a_command_in_its_own_process_prints_only_its_result(dense):
    done = run("inspect", dense)
    assert "what a rank saves" in done.stdout
    assert done.stderr == "", "no progress bars and no warnings when piped"


@pytest.fixture
def table(tmp_path) -> Path:
    torch.manual_seed(0)
    rows = torch.randn(90, 6) @ torch.randn(6, 10)
    save_file({"rows": rows, "ids": torch.arange(9)}, tmp_path / "table.safetensors")
    return tmp_path / "table.safetensors"


def test_train_writes_the_factors_of_a_table_in_a_file(table, tmp_path):
    out, log, recipe = tmp_path / "f.safetensors", tmp_path / "log", tmp_path / "r.yaml"
    recipe.write_text("rank: 2\noptions: {epochs: 9, batch_size: 16, mse_weight: 0.1}\n")
    arguments = ("train", table, "--tensor", "rows", "-o", out, "--recipe", recipe, "--rank", 4)
    more = ("--epochs", 2, "--log", log, "--checkpoint", tmp_path / "c.pt", "--engine", "torch")
    done = run(*arguments, *more, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    options = dict(epochs=2, batch_size=16, mse_weight=0.1, engine="torch", progress=False)
    expected = autoencoder(TableFile(table, "rows"), 4, **options)
    factors = Factors.load(out)
    assert torch.equal(factors.codes, expected.codes)
    assert (report["rank"], report["table_bytes"], report["compressed_bytes"]) == (4, 3600, factors.nbytes)
    last = json.loads(log.read_text().splitlines()[-1])
    assert (report["epoch"], report["direction_error"]) == (last["epoch"], last["direction_error"])

    done = run(*arguments, *more)
    assert done.returncode == 1
    assert "output: " in done.stderr
    done = run(*arguments, *more, "--overwrite")  # from the checkpoint of the finished run
    assert done.returncode == 0
    assert "rank" in done.stdout
    assert torch.equal(Factors.load(out).codes, expected.codes)


@pytest.mark.slow
def test_train_under_torchrun_has_the_bits_of_one_process(table, tmp_path):
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "embkern",
        "train",
    ]
    command = [*launch, table, "--tensor", "rows", "--ratio", "2", "-o", tmp_path / "f", "--json"]
    command += ["--epochs", "2", "--batch-size", "32"]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["processes"] == 2
    options = dict(epochs=2, batch_size=32, progress=False, world=World(8))
    expected = autoencoder(TableFile(table, "rows"), report["rank"], **options)
    assert torch.equal(Factors.load(tmp_path / "f").codes, expected.codes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{out}.none", "--tensor", "rows", "--rank", "2"], "path: expected a safetensors file, found none"),
        (["{table}", "--tensor", "row", "--rank", "2"], "name: expected one of .*rows.* in .*, got 'row'"),
        (["{table}", "--tensor", "ids", "--rank", "2"], "ids: expected a dtype of .*, got I64"),
        (["{table}", "--tensor", "rows"], "expected exactly one of ratio and rank"),
        (["{table}", "--tensor", "rows", "--rank", "11"], "rank: expected 1 <= rank <= H = 10, got 11"),
        (["{table}", "--tensor", "rows", "--rank", "2", "--lr", "-1"], "autoencoder: lr: "),
        (["{table}", "--tensor", "rows", "--rank", "2", "--recipe", "{svd}"], "method: expected autoencoder"),
        (["{table}", "--tensor", "rows", "--rank", "2", "--device", "abacus"], "device: .* got 'abacus'"),
        (["{table}", "--tensor", "rows", "--rank", "2", "--device", "cuda:99"], "device: .* got cuda:99"),
        (
            ["{table}", "--tensor", "rows", "--rank", "2", "--shards", "0"],
            "shards: expected at least 1, got 0",
        ),
        (["{table}", "--tensor", "rows", "--rank", "2", "--timeout", "0"], "timeout: expected more than 0"),
        (["{table}", "--tensor", "rows", "--rank", "2", "--engine", "steam"], "engine: .* got 'steam'"),
        (
            ["{table}", "--tensor", "rows", "--rank", "2", "--log", "{out}/no/log"],
            "log: expected a file in a",
        ),
        (
            ["{table}", "--tensor", "rows", "--rank", "2", "--checkpoint-seconds", "-1"],
            "checkpoint_seconds: expected at least 0",
        ),
    ],
)
def test_errors_of_train_name_the_argument(table, tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "svd.yaml").write_text("method: svd\n")
    names = dict(table=table, out=tmp_path / "out", svd=tmp_path / "svd.yaml")
    filled = [part.format(**names) for part in arguments]
    monkeypatch.setattr(sys, "argv", ["embkern", "train", *filled, "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(f"^embkern: .*{message}", lines[0]), lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("{table}", "output: .* is the table to read"),
        ("{table}.none/f", "output: expected a file in a directory that exists"),
        ("{folder}", "output: expected a file, got the directory"),
    ],
)
def test_train_refuses_an_output_that_cannot_be_written(
    table, tmp_path, monkeypatch, capsys, output, message
):
    filled = output.format(table=table, folder=tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["embkern", "train", str(table), "--tensor", "rows", "--rank", "2", "-o", filled]
    )
    with pytest.raises(SystemExit):
        cli.main()
    assert re.search(message, capsys.readouterr().err)
    assert TableFile(table, "rows").shape == (90, 10)


def test_version():
    assert run("--version").stdout == f"embkern {embkern.__version__}\n"


def test_env_shows_the_backends_and_reasons():
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
            ["compress", "{dense}", "-o", "{out}", "--rank", "40", "--method", "svd"],
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
        (["evaluate", "table", "{dense}", "--against", "{dense}"], "expected one compressed by embkern"),
        (["export", "{dense}", "-o", "{out}"], "expected one compressed by embkern"),
        (
            ["export", "{dense}", "-o", "{out}", "--format", "int4"],
            "format: expected one of dense, onnx, gguf",
        ),
        (
            ["export", "{dense}", "-o", "{out}", "--bits", "4"],
            "bits: expected none for the format dense, got 4",
        ),
        (["inspect", "{out}/none"], "expected a directory or a name on the hub"),
    ],
)
def test_errors_are_one_line_without_a_traceback(dense, tmp_path, monkeypatch, capsys, arguments, message):
    filled = [part.format(dense=dense, out=tmp_path / "out") for part in arguments]
    monkeypatch.setattr(sys, "argv", ["embkern", *filled])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("embkern: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert not (tmp_path / "out").exists()


def test_an_error_of_a_command_in_its_own_process(dense, tmp_path):
    done = run("compress", dense, "-o", tmp_path / "out", "--ratio", "0.5")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("embkern: recipe: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_traceback_is_shown_on_request(dense, tmp_path):
    done = run("compress", dense, "-o", tmp_path / "out", "--ratio", "0.5", EMBKERN_DEBUG="1")
    assert "Traceback" in done.stderr

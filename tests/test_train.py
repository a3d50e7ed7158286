"""Training on a table in a file: output and report, in one process and under torchrun, and errors."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from embkern.methods.sharded import SHARDS
from embkern.recipe import Recipe
from embkern.tables.factors import Factors
from embkern.train import train
from tests.methods.test_sharded import environments

RECIPE = Recipe.parse(method="autoencoder", rank=2, options={"epochs": 2, "batch_size": 32})


@pytest.fixture
def table(tmp_path) -> Path:
    save_file({"t": torch.randn(90, 6) @ torch.randn(6, 10)}, tmp_path / "table")
    return tmp_path / "table"


@pytest.mark.parametrize("torchrun", [False, True])
def test_a_finished_checkpoint_gives_the_same_output_and_report(table, tmp_path, monkeypatch, torchrun):
    for name, value in environments(1)[0].items() if torchrun else ():
        monkeypatch.setenv(name, value)
    reports = []
    for name in ("first", "again"):
        if torchrun:
            monkeypatch.setenv("MASTER_PORT", environments(1)[0]["MASTER_PORT"])
        run = dict(checkpoint=tmp_path / "c", progress=False)
        report = train(table, "t", RECIPE, tmp_path / name, **run)
        assert report is not None
        reports.append(report.model_dump(exclude={"output", "seconds"}))
    assert reports[0] == reports[1]
    assert (tmp_path / "first").read_bytes() == (tmp_path / "again").read_bytes()
    assert torch.equal(Factors.load(tmp_path / "first").codes, Factors.load(tmp_path / "again").codes)


@pytest.mark.parametrize("argument", ["output", "checkpoint", "log"])
@pytest.mark.parametrize("place", ["none", "directory", "file", "read-only"])
def test_a_file_that_cannot_be_written_is_refused_before_training(
    table, tmp_path, monkeypatch, argument, place
):
    def never(*args, **kwargs):
        raise AssertionError("training began before the output was checked")

    trainer = importlib.import_module("embkern.methods.autoencoder.trainer").Trainer
    monkeypatch.setattr(trainer, "__init__", never)
    path, error, message = tmp_path / "missing" / "f", FileNotFoundError, "expected a file in a directory"
    if place == "directory":
        path, error, message = tmp_path, IsADirectoryError, "expected a file, got the directory"
    elif place == "file":
        path = table / "f"
    elif place == "read-only":
        path, error, message = Path("/proc/self/f"), OSError, r"cannot be written \(.*/proc/\w+/f'"
        if not path.parent.is_dir():
            pytest.skip("needs a directory that root cannot write to")
    places = {"output": tmp_path / "o"} | {argument: path}
    with pytest.raises(error, match=f"{argument}: {message}"):
        train(table, "t", RECIPE, **places, progress=False)
    assert os.listdir(tmp_path) == ["table"]


def test_torchrun_has_the_bytes_of_one_process_with_the_same_shards(table, tmp_path, monkeypatch):
    train(table, "t", RECIPE, tmp_path / "one", shards=SHARDS, progress=False)
    for name, value in environments(1)[0].items():
        monkeypatch.setenv(name, value)
    train(table, "t", RECIPE, tmp_path / "torchrun", progress=False)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "torchrun").read_bytes()

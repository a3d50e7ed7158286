"""``compress`` in several processes: the saved model is that of one process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

import embkern
from embkern.methods.sharded import World
from embkern.models.saving import MANIFEST_NAME
from tests.example_models import build
from tests.methods.processes import environments

SECONDS = 900  # time limit for a process


def run(output, source, *options, size=1):
    """Run ``embkern compress`` in processes as torchrun starts them, and return how each ended."""
    command = [sys.executable, "-m", "embkern", "compress", source, "-o", output, *options]
    processes = [
        subprocess.Popen(
            list(map(str, command)),
            env={**os.environ, **each},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for each in environments(size)
    ]
    try:
        return [(*process.communicate(timeout=SECONDS), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_save_the_model_of_one(tmp_path):
    source = tmp_path / "dense"
    build("llama-untied").save_pretrained(source)
    wanted = ("--calibrate", "--tables", "input=3", "--tables", "output=2.5")
    for name, size in (("one", 1), ("two", 2)):
        ended = run(tmp_path / name, source, *wanted, size=size)
        assert [code for *_, code in ended] == [0] * size, ended
        assert [bool(printed) for printed, *_ in ended] == [True] + [False] * (size - 1)  # by the first
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    assert MANIFEST_NAME in one
    assert one["model.safetensors"] == two["model.safetensors"]
    assert one["config.json"] == two["config.json"]
    # What only the first process finds is an error of all.
    ended = run(tmp_path / "two", source, "--ratio", 2, "--no-calibrate", size=2)
    assert [code for *_, code in ended] == [1, 1], ended
    assert "exists; choose another name" in ended[0][1]


def test_a_method_that_does_not_divide_rows_is_refused():
    message = "world: expected with method allocate, autoencoder, direction only, got method 'svd'"
    with pytest.raises(ValueError, match=message):
        embkern.compress(build("bert"), method="svd", rank=4, world=World())

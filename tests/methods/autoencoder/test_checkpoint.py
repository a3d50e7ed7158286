"""Checkpoints of the autoencoder: resumed runs, and files that are refused."""

from __future__ import annotations

import itertools
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from embkern.io.tensor_format import TensorFormat
from embkern.methods import autoencoder
from embkern.methods.autoencoder.checkpoint import FORMAT
from tests.methods.autoencoder.runs import QUICK, equal


def test_resume_after_any_epoch_ends_with_the_same_weights(table, tmp_path):
    whole = autoencoder(table, 3, **QUICK, log=tmp_path / "whole.jsonl")
    for stop in (1, 2):
        path = tmp_path / f"{stop}.pt"

        def stop_at(factors, calls=[], stop=stop):  # noqa: B006
            calls.append(1)
            if len(calls) > stop:
                raise InterruptedError
            return float((1 - F.cosine_similarity(table, factors.to_dense())).mean())

        with pytest.raises(InterruptedError):
            autoencoder(table, 3, **QUICK, checkpoint=path, checkpoint_seconds=0, validate=stop_at)
        resumed = autoencoder(table, 3, **QUICK, checkpoint=path, log=tmp_path / "resumed.jsonl")
        assert equal(resumed, whole)
        assert len((tmp_path / "resumed.jsonl").read_text().splitlines()) == 3


def epoch_of(path):
    with safe_open(path, "pt") as file:
        return int(file.metadata()["epoch"])


@pytest.mark.slow
def test_resume_after_kills_at_any_step_ends_with_the_same_weights(tmp_path):
    table = torch.randn(400, 6) @ torch.randn(6, 10)
    torch.save(table, tmp_path / "table.pt")
    path, options = tmp_path / "c.pt", dict(batch_size=4, progress=False, checkpoint_seconds=0)
    script = (
        "import sys, torch; from embkern.methods import autoencoder\n"
        "table = torch.load(sys.argv[1] + '/table.pt')\n"
        f"autoencoder(table, 3, checkpoint=sys.argv[1] + '/c.pt', epochs=10**6, **{options})\n"
    )

    def mark():
        return os.stat(path).st_mtime_ns if path.exists() else None

    done = 0
    for _ in range(2):
        before, deadline = mark(), time.monotonic() + 60
        process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
        while mark() == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1 * random.random())
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert epoch_of(path) > done
        done = epoch_of(path)
    resumed = autoencoder(table, 3, **options, epochs=done + 2, checkpoint=path)
    assert equal(resumed, autoencoder(table, 3, **options, epochs=done + 2))


def test_checkpoints_are_at_least_checkpoint_seconds_apart(table, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(TensorFormat, "save", lambda *args, epoch, **rest: saved.append(epoch))
    autoencoder(table, 3, **QUICK, checkpoint=tmp_path / "c.pt", checkpoint_seconds=1e9)
    assert saved == [3]
    autoencoder(table, 3, **QUICK, checkpoint=tmp_path / "d.pt", checkpoint_seconds=0)
    assert saved == [3, 1, 2, 3]


def test_whole_table_steps_can_be_resumed(table, tmp_path):
    options = QUICK | dict(batch_size=10**6, epochs=9, rmse_weight=0.1)
    half = options | dict(epochs=4)
    autoencoder(table, 3, **half, checkpoint=tmp_path / "c.pt")
    assert equal(
        autoencoder(table, 3, **options, checkpoint=tmp_path / "c.pt"), autoencoder(table, 3, **options)
    )


def test_a_finished_run_is_not_trained_again_and_can_be_extended(table, tmp_path):
    path = tmp_path / "c.pt"
    done = autoencoder(table, 3, **QUICK, checkpoint=path)
    before = os.stat(path).st_mtime_ns
    assert equal(autoencoder(table, 3, **QUICK, checkpoint=path), done)
    assert os.stat(path).st_mtime_ns == before
    longer = autoencoder(table, 3, **QUICK | dict(epochs=5), checkpoint=path)
    assert equal(longer, autoencoder(table, 3, **QUICK | dict(epochs=5)))
    with pytest.raises(ValueError, match="epochs: expected at least the checkpoint's 5, got 3"):
        autoencoder(table, 3, **QUICK, checkpoint=path)


def test_a_foreign_or_damaged_checkpoint_is_refused(table, tmp_path):
    path = tmp_path / "c.pt"
    autoencoder(table, 3, **QUICK, checkpoint=path)
    for arguments in (
        (table, 4, QUICK),
        (table + 1, 3, QUICK),
        (table.view(60, 20), 3, QUICK),
        (table, 3, QUICK | dict(lr=0.1)),
    ):
        with pytest.raises(ValueError, match="checkpoint: .* belongs to another run"):
            autoencoder(*arguments[:2], **arguments[2], checkpoint=path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="checkpoint: .* is not a readable safetensors file .* delete it"):
        autoencoder(table, 3, **QUICK, checkpoint=path)
    torch.save({"identity": {}, "epoch": 1}, path)  # the format of early versions
    with pytest.raises(ValueError, match=f"checkpoint: {path} is of an earlier version of embkern"):
        autoencoder(table, 3, **QUICK, checkpoint=path)


@pytest.mark.parametrize(
    ("name", "value"), [("best_score", math.nan), ("best_score", math.inf), ("step", 2**60), ("epoch", 0)]
)
def test_a_checkpoint_that_no_run_wrote_is_refused(table, tmp_path, name, value):
    path = tmp_path / "c"
    autoencoder(table, 3, **QUICK, checkpoint=path)
    tensors, settings = FORMAT.load(path, lambda *each: each)
    FORMAT.save(path, tensors, **{**settings, name: value})
    with pytest.raises(ValueError, match=f"checkpoint: {path}: .*{name}"):
        autoencoder(table, 3, **QUICK, checkpoint=path)


def test_a_named_pipe_as_checkpoint_does_not_block(table, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("blocks on the pipe"))
    signal.alarm(20)
    try:
        with pytest.raises(ValueError, match="checkpoint: .* found none at .*pipe"):
            autoencoder(table, 3, **QUICK, checkpoint=tmp_path / "pipe")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_detected(table, tmp_path):
    path, draw = tmp_path / "c", random.Random(0)
    autoencoder(table, 3, **QUICK, checkpoint=path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in [*draw.sample(range(header), 120), *draw.sample(range(header, len(whole)), 60)]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"checkpoint: {path}.*delete it to start anew"):
            autoencoder(table, 3, **QUICK, checkpoint=path)


def test_equal_checkpoints_have_equal_bytes(table, tmp_path, monkeypatch):
    ticks = itertools.count()
    # The history contains the duration of epochs.
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    files = set()
    for number in range(4):
        autoencoder(table, 3, **QUICK, checkpoint=tmp_path / str(number))
        files.add((tmp_path / str(number)).read_bytes())
    assert len(files) == 1

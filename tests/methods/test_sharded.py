"""Distributed runs: the same bits for any number of processes, and the end of a run that loses one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.testing import assert_close

from embkern.io.mapped_table import TableFile
from embkern.methods import autoencoder
from embkern.methods.sharded import DistributedWorld, FirstProcessError, World, joined, launched
from embkern.tables.factors import Factors
from tests.methods.processes import environments

SHARDS = 8
SECONDS = 60  # time limit for a process

# The runs of a process: every kind of step, odd sizes, and a table with fewer rows than shards.
RUNS = {
    "batches": ("t", 3, dict(batch_size=50, epochs=3, rmse_weight=0.1)),
    "whole table from the svd": ("t", 3, dict(batch_size=1000, epochs=5, init="svd")),
    "elu": ("t", 3, dict(batch_size=64, epochs=2, activation="elu")),
    "narrow": ("b", 2, dict(batch_size=40, epochs=2)),
    "few rows": ("few", 1, dict(batch_size=2, epochs=2)),
}
WORKER = """
import sys
from embkern.methods import autoencoder
from embkern.methods.sharded import joined
from embkern.io.mapped_table import TableFile

def score(factors):
    return float(factors.codes.abs().mean())

with joined(int(sys.argv[2]), timeout=60) as world:
    for number, (name, rank, options) in enumerate(eval(sys.argv[3])):
        table = TableFile(sys.argv[1], name)
        score_too = {"validate": score} if number == 0 else {}
        factors = autoencoder(table, rank, world=world, progress=False, **score_too, **options)
        factors.save(f"{sys.argv[1]}.{world.size}.{world.rank}.{number}")
"""


@pytest.fixture
def path(tmp_path) -> Path:
    table = torch.randn(203, 6) @ torch.randn(6, 10)
    save_file({"t": table, "b": table[:90].bfloat16(), "few": table[:5].clone()}, tmp_path / "tables")
    return tmp_path / "tables"


@pytest.fixture
def start():
    """Return a function that starts the processes of a run like torchrun; they are killed after the test."""
    started: list[subprocess.Popen[str]] = []

    def call(size: int, *command: object) -> list[subprocess.Popen[str]]:
        for each in environments(size):
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                env={**os.environ, **each},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            started.append(process)
        return started[-size:]

    yield call
    for process in started:
        process.kill()
        process.communicate()


def score(factors: Factors) -> float:
    return float(factors.codes.abs().mean())


def equal(left: Factors, right: Factors) -> bool:
    return all(torch.equal(tensor, right.tensors()[name]) for name, tensor in left.tensors().items())


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same_bits(path, start, monkeypatch):
    started = [start(size, "-c", WORKER, path, SHARDS, list(RUNS.values())) for size in (2, 3)]
    expected = []
    for number, (name, rank, options) in enumerate(RUNS.values()):
        too = {"validate": score} if number == 0 else {}
        run = dict(options, **too, progress=False)
        expected.append(autoencoder(TableFile(path, name), rank, world=World(SHARDS), **run))
        # Sharding changes the result only by rounding.
        plain = autoencoder(TableFile(path, name), rank, **run)
        assert_close(expected[-1].to_dense(), plain.to_dense(), rtol=1e-2, atol=1e-2)
    for name, value in environments(1)[0].items():
        monkeypatch.setenv(name, value)
    assert launched()
    name, rank, options = RUNS["batches"]
    with joined(SHARDS) as world:
        alone = autoencoder(
            TableFile(path, name), rank, world=world, validate=score, progress=False, **options
        )
    assert equal(alone, expected[0])
    for size, processes in zip((2, 3), started, strict=True):
        for rank, process in enumerate(processes):
            error = process.communicate(timeout=SECONDS)[1]
            assert process.returncode == 0, error
            for number, wanted in enumerate(expected):
                assert equal(Factors.load(f"{path}.{size}.{rank}.{number}"), wanted), (size, rank, number)


def epoch_of(path):
    with safe_open(path, "pt") as file:
        return int(file.metadata()["epoch"])


@pytest.mark.slow
def test_a_lost_rank_ends_the_run_with_a_message_and_a_checkpoint(path, start, tmp_path):
    checkpoint = tmp_path / "c.pt"
    command = (
        "-m", "embkern", "train", path, "--tensor", "t", "-o", tmp_path / "f", "--rank", 3, "--epochs", 10**6,
        "--batch-size", 50, "--checkpoint", checkpoint, "--checkpoint-seconds", 0, "--timeout", SECONDS,
    )  # fmt: skip

    def run_until_two_more_checkpoints():
        processes, deadline, seen = start(2, *command), time.monotonic() + SECONDS, set()
        while len(seen) < 3 and time.monotonic() < deadline:
            assert [process.poll() for process in processes] == [None, None]
            seen.add(os.stat(checkpoint).st_mtime_ns if checkpoint.exists() else 0)
            time.sleep(0.002)
        return processes

    # A killed process: the next collective operation of the other one fails.
    survivor, victim = run_until_two_more_checkpoints()
    victim.send_signal(signal.SIGKILL)
    message = survivor.communicate(timeout=SECONDS)[1]
    done = epoch_of(checkpoint)
    assert "embkern: rank 0: another rank was lost (" in message
    assert f"); {checkpoint} holds epoch {done} of 1000000: run the same command again" in message
    assert survivor.returncode == 1
    victim.communicate()

    # A stopped process: the other one waits for it when the SIGTERM of torchrun arrives.
    survivor, victim = run_until_two_more_checkpoints()
    victim.send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    survivor.send_signal(signal.SIGTERM)
    message = survivor.communicate(timeout=SECONDS)[1]
    victim.send_signal(signal.SIGKILL)
    assert epoch_of(checkpoint) > done
    done = epoch_of(checkpoint)
    assert "embkern: rank 0: another rank was lost, or the run was stopped (SIGTERM); " in message
    assert f"{checkpoint} holds epoch {done} of 1000000: run the same command again" in message
    assert survivor.returncode == 128 + signal.SIGTERM
    victim.communicate()

    table, run = TableFile(path, "t"), dict(batch_size=50, epochs=done + 2, progress=False)
    resumed = autoencoder(table, 3, **run, checkpoint=checkpoint, world=World(SHARDS))
    assert equal(resumed, autoencoder(table, 3, **run, world=World(SHARDS)))
    assert not list(tmp_path.glob(".*.tmp"))
    with pytest.raises(ValueError, match=r"belongs to another run \(different table\)"):
        autoencoder(table, 3, **run, checkpoint=checkpoint)  # one shard rounds differently from eight


def test_the_bits_of_a_sharded_run_do_not_depend_on_threads():
    # At these sizes the sums of MKL differ between one thread and four.
    table, before = torch.randn(2 * 3815, 384), torch.get_num_threads()
    run = dict(batch_size=10**6, epochs=1, init="svd", progress=False, world=World(2))
    factors = []
    try:
        for activation in (None, "elu"):
            for threads in (1, 4):
                torch.set_num_threads(threads)
                factors.append(autoencoder(table, 75, **run, activation=activation))
                assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert equal(factors[0], factors[1])
    assert equal(factors[2], factors[3])


def test_shards_cover_the_table_and_are_distributed_in_order():
    table = torch.arange(23.0).view(23, 1)
    sections = World(SHARDS).sections(table)
    assert torch.equal(torch.cat([section.rows for section in sections]), table)
    assert [section.start for section in sections] == [int(section.rows[0]) for section in sections]
    for size in range(1, SHARDS + 1):
        world = World(SHARDS)
        world.size = size
        assert [shard for rank in range(size) for shard in world.owned(rank)] == list(range(SHARDS))
        assert all(len(world.owned(rank)) for rank in range(size))


@pytest.fixture
def world(monkeypatch):
    for name, value in environments(1)[0].items():
        monkeypatch.setenv(name, value)
    with joined(SHARDS) as world:
        yield world


def test_an_error_of_the_first_process_is_raised_on_all(world, monkeypatch):
    def fail():
        raise KeyError("what")

    with pytest.raises(KeyError, match="what"):
        world.on_first(fail)
    assert world.on_first(lambda: 3) == 3
    monkeypatch.setattr(world, "rank", 1)
    monkeypatch.setattr(
        "torch.distributed.broadcast_object_list",
        lambda outcome, source, group: outcome.__setitem__(slice(None), [None, "what"]),
    )
    with pytest.raises(FirstProcessError, match="^what$"):
        world.on_first(lambda: pytest.fail("called on a second process"))


def test_processes_that_round_differently_are_detected(world, monkeypatch):
    world.check_equal_weights(torch.ones(3))
    monkeypatch.setattr(DistributedWorld, "gather", lambda self, value: [value, value + 1])
    with pytest.raises(RuntimeError, match="no longer have the same weights"):
        world.check_equal_weights(torch.ones(3))


def test_what_cannot_be_sharded_is_named(path, monkeypatch):
    with pytest.raises(ValueError, match=r"shards: expected at least one per process \(1\), got 0"):
        World(0)
    with pytest.raises(ValueError, match="engine: expected None for a sharded table, got 'torch'"):
        autoencoder(TableFile(path, "t"), 3, world=World(2), engine="torch")
    monkeypatch.delenv("RANK", raising=False)
    assert not launched()

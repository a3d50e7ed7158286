"""``allocate`` in several processes, each of which packs its own rows: the bits that one process makes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from embkern import Calibration
from embkern.io.mapped_table import TableFile
from embkern.methods import allocate, table_rows
from embkern.methods.sharded import DistributedWorld, World, joined
from tests.methods.processes import environments
from tests.methods.test_metric_allocation import calibration

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch was built without gloo"
)
BLOCK = 64
ROWS, WIDTH = 700, 64  # 11 blocks of rows, the last one not full
SECONDS = 600  # time limit for a process

# Both objectives, every option that takes part in the search, tables of one block, and refused ones.
RUNS = {
    "counts": ("t", dict(ratio=10, exponent=0.5)),
    "calibration": ("t", dict(ratio=8, calibration=True)),
    "floor": ("t", dict(ratio=6, floor=0.8)),
    "floor and calibration": ("t", dict(ratio=6, floor=0.7, calibration=True)),
    "no basis": ("t", dict(ratio=6, speed=1.0)),
    "not read": ("t", dict(ratio=8, unseen="mean")),
    "bf16": ("b", dict(ratio=4)),
    "one block": ("few", dict(ratio=2)),
    "too small": ("t", dict(ratio=1000)),
    "floor too high": ("t", dict(ratio=6, floor=0.9999999)),
}
WORKER = """
import sys, torch
from embkern import Calibration
from embkern.io.mapped_table import TableFile
from embkern.methods import allocate, table_rows
from embkern.methods.sharded import joined

table_rows.BLOCK_ROWS = int(sys.argv[2])
known, counts = Calibration.load(sys.argv[1] + ".calibration"), torch.load(sys.argv[1] + ".counts")
with joined(timeout=60) as world:
    for number, (name, options) in enumerate(eval(sys.argv[3])):
        table = TableFile(sys.argv[1], name)
        if options.pop("calibration", False):
            options["calibration"] = known
        else:
            options["counts"] = counts[: len(table)]
        try:
            packed = allocate(table, world=world, **options)
        except ValueError as error:
            print(number, error)
        else:
            packed.save(f"{sys.argv[1]}.{world.size}.{world.rank}.{number}")
"""


@pytest.fixture
def path(tmp_path) -> Path:
    spectrum = torch.arange(1, WIDTH + 1).float().pow(-0.7)
    table = torch.randn(ROWS, WIDTH) * spectrum @ torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
    table[5] = 0
    save_file({"t": table, "b": table.bfloat16(), "few": table[:33].clone()}, tmp_path / "tables")
    calibration(ROWS, WIDTH).save(tmp_path / "tables.calibration")
    counts = 1 / torch.arange(1, ROWS + 1, dtype=torch.float64)
    torch.save(torch.where(torch.arange(ROWS) % 7 == 3, 0.0, counts), tmp_path / "tables.counts")
    return tmp_path / "tables"


@pytest.fixture
def one_thread(monkeypatch):
    """As many threads as the processes have, and blocks as small as theirs."""
    monkeypatch.setattr(table_rows, "BLOCK_ROWS", BLOCK)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(size: int, *arguments: object) -> list[str]:
    """Run a worker in processes as torchrun starts them, and return what each prints."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", *map(str, arguments)],
            env={**os.environ, **each},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for each in environments(size)
    ]
    try:
        done = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, error) in zip(processes, done, strict=True):
        assert process.returncode == 0, error
    return [output for output, _ in done]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_ranks_packs_the_same_bits(path, one_thread, size):
    printed = run(size, WORKER, path, BLOCK, list(RUNS.values()))
    known, counts, refused = Calibration.load(f"{path}.calibration"), torch.load(f"{path}.counts"), []
    for number, (name, options) in enumerate(RUNS.values()):
        table, told = TableFile(path, name), dict(options)
        if told.pop("calibration", False):
            told["calibration"] = known
        else:
            told["counts"] = counts[: len(table)]
        try:
            expected = allocate(table, **told)
        except ValueError as error:
            refused.append(f"{number} {error}\n")
            continue
        for rank in range(size):
            found = type(expected).load(f"{path}.{size}.{rank}.{number}").tensors()
            assert found.keys() == expected.tensors().keys()
            for part, tensor in expected.tensors().items():
                assert torch.equal(found[part], tensor), (number, rank, part)
    assert len(refused) == 2
    assert printed == ["".join(refused)] * size


# What a process is given beside the others' arguments, and the error of every process.
ALIKE = dict(ratio=8.0, counts=torch.ones(ROWS))
OTHERS = {
    "table": (dict(table="other"), "table: expected the same on all ranks, got"),
    "ratio": (dict(ratio=9.0), "ratio: expected the same on all ranks, got"),
    "counts": (dict(counts=None), "counts: expected the same on all ranks, got"),
    "calibration": (dict(calibration=True), "calibration: expected the same on all ranks, got"),
    "read": (dict(read=torch.ones(ROWS, dtype=torch.bool)), "read: expected the same on all ranks, got"),
    "option": (dict(floor=0.5), "options: expected the same on all ranks, got"),
    "refused on one": (dict(counts=-torch.ones(ROWS)), "counts: expected finite values of at least 0"),
}
MISMATCH = """
import sys, torch
from embkern import Calibration
from embkern.io.mapped_table import TableFile
from embkern.methods import allocate
from embkern.methods.sharded import joined

cases = torch.load(sys.argv[1] + ".cases")
with joined(timeout=60) as world:
    for own, others in cases:
        given = {**others, **(own if world.rank else {})}
        if given.pop("calibration", False):
            given["calibration"] = Calibration.load(sys.argv[1] + ".calibration")
        table = TableFile(sys.argv[1], given.pop("table", "t"))
        try:
            allocate(table, world=world, **given)
        except ValueError as error:
            print(error)
"""


@pytest.mark.slow
def test_ranks_that_are_given_different_arguments_all_refuse(path):
    save_file({"t": torch.ones(ROWS, WIDTH), "other": torch.eye(ROWS, WIDTH)}, path)
    torch.save([(own, ALIKE) for own, _ in OTHERS.values()], f"{path}.cases")
    for rank, printed in enumerate(run(2, MISMATCH, path)):
        lines = printed.splitlines()
        assert len(lines) == len(OTHERS)
        for line, (name, (_, message)) in zip(lines, OTHERS.items(), strict=True):
            said = f"rank 1: {message}" if name == "refused on one" and rank == 0 else message
            assert line.startswith(said), (rank, name, line)


@pytest.fixture
def world(monkeypatch):
    for name, value in environments(1)[0].items():
        monkeypatch.setenv(name, value)
    with joined() as world:
        yield world


def test_a_group_of_one_packs_like_no_group(world, one_thread):
    table = torch.randn(3 * BLOCK + 5, WIDTH)
    expected = allocate(table, ratio=6).tensors()
    for own in (world, DistributedWorld(group=torch.distributed.new_group([0])), World()):
        found = allocate(table, ratio=6, world=own).tensors()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_blocks_are_divided_in_turns_and_added_in_their_order():
    for size in (1, 2, 5):
        worlds = [World() for _ in range(size)]
        for rank, each in enumerate(worlds):
            each.rank, each.size = rank, size
        owned = [set(each.own_blocks(4)) for each in worlds]
        assert sorted(block for blocks in owned for block in blocks) == [0, 1, 2, 3]
    parts = [torch.tensor([1e16, 1.0]), torch.tensor([1.0, 2.0]), torch.tensor([-1e16, 3.0])]
    total = World().sum_blocks((part.split(1) for part in parts), 3, 2)
    assert total.dtype == torch.float64
    assert total.tolist() == [0.0, 6.0]  # 1 is lost beside 1e16, as in every order of processes


def test_a_group_that_cannot_be_used_is_named(world, monkeypatch):
    monkeypatch.setattr("torch.distributed.get_backend_config", lambda group: "cuda:nccl")
    with pytest.raises(
        ValueError, match=r"group: expected one that sends CPU tensors \(cpu:gloo\), got cuda:nccl"
    ):
        DistributedWorld()
    monkeypatch.setattr("torch.distributed.get_rank", lambda group: -1)
    with pytest.raises(ValueError, match="group: expected one that this process is in"):
        DistributedWorld()

"""Training on several processes: the rows are sharded, the weights are the same everywhere, bit for bit.

The table is cut into a fixed number of shards, whatever the number of processes; a process owns consecutive
shards and reads only their rows. Per step every shard's gradient is summed over its rows of the batch, all
these are gathered, added in the order of the shards, and every process takes the same step of Adam. The
result depends on the number of shards, never on how many processes share them or on their threads. A step
costs shards x (parameters + 1) values of communication and of memory on every process: it is meant for large
batches and steps on the whole table. What plain torch computes (the ELU variant, the final codes, and all
where the native extension is not built) runs on one thread per process. Processors of different kinds may
round differently; ``agree`` notices.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..io.mapped_table import TableFile
from .base import Rows

SHARDS = 8  # into which a table is cut unless asked otherwise


TIMEOUT = 60.0  # seconds to wait for another process


GRACE_SECONDS = 2.0  # for the first process to report before torchrun stops it


# The old name is deprecated from torch 2.13 on, the new one not in 2.10.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


Result = TypeVar("Result")


class RankLostError(RuntimeError):
    """Another process of the run is gone; the message says what is kept and how to go on."""


class EverywhereError(RuntimeError):
    """An error of the first process, raised on the others: it is the first one's to report."""

    told_by_the_first = True


class Section(NamedTuple):
    """Consecutive rows of a table, and the id of the first."""

    start: int
    rows: Rows


class World:
    """The processes of a run and the shards of its table: here one process that has all shards.

    Attributes:
        rank, size: of this process, and the number of processes.
        shards: the number of shards; with more than one, gradients are summed shard by shard.
        kept: what is to be told of the run's checkpoint when a process is lost.
    """

    rank, size = 0, 1

    def __init__(self, shards: int = 1) -> None:
        if shards < self.size:
            raise ValueError(f"shards: expected at least one per process ({self.size}), got {shards}")
        self.shards = shards
        self.kept = "nothing is kept yet"

    def owned(self, rank: int | None = None) -> range:
        """The shards of a process, by default of this one."""
        rank = self.rank if rank is None else rank
        return range(self.shards * rank // self.size, self.shards * (rank + 1) // self.size)

    def sections(self, rows: Rows) -> list[Section]:
        """Cut a table (V, H) into shards of consecutive rows and return those of this process."""
        bounds = [len(rows) * shard // self.shards for shard in range(self.shards + 1)]
        cut = rows.section if isinstance(rows, TableFile) else lambda start, stop: rows[start:stop]
        return [Section(bounds[shard], cut(bounds[shard], bounds[shard + 1])) for shard in self.owned()]

    def sum(self, leaves: Iterable[Tensor]) -> Tensor:
        """Add the leaves (n,) of all shards, first to last, given those of this process: (n,)."""
        leaves = iter(leaves)
        total = next(leaves).clone()
        for leaf in leaves:
            total += leaf
        return total

    def collect(self, rows: list[Tensor]) -> Tensor:
        """Put the rows (n, m) of all shards together, given those of this process, a tensor per shard."""
        return torch.cat(rows)

    def all(self, value: Result) -> list[Result]:
        """Return the values of all processes, by rank."""
        return [value]

    def on_first(self, function: Callable[[], Result]) -> Result:
        """Call a function on the first process alone and return its result, or raise its error, on all."""
        return function()

    def agree(self, weights: Tensor) -> None:
        """Raise unless every process has the same weights."""

    @contextlib.contextmanager
    def one_thread(self, needed: bool = True) -> Iterator[None]:
        """Give BLAS one CPU thread where the table is sharded: its sums depend on how many there are.

        torchrun gives one process all cores and several one each, unless OMP_NUM_THREADS is set.
        """
        before = torch.get_num_threads()
        if needed and self.shards > 1:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


class DistributedWorld(World):
    """The processes of torch.distributed's default group: gloo for what is on the CPU, NCCL for the rest."""

    def __init__(self, shards: int) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        super().__init__(shards)
        self.lost = False  # whether this process is about to end and to say why
        self.writing = threading.Lock()  # held while the first process writes files

    def sum(self, leaves: Iterable[Tensor]) -> Tensor:
        """Add the leaves (n,) of all shards, first to last, given those of this process: (n,)."""
        owned = torch.stack(list(leaves))
        mine = owned.new_zeros(-(-self.shards // self.size), owned.shape[1])  # as many on every process
        mine[: len(owned)] = owned
        everyone = mine.new_empty(self.size, *mine.shape)
        with self._together():
            _ALL_GATHER(everyone.view(-1), mine.view(-1))
        return super().sum(
            leaf for rank, part in enumerate(everyone) for leaf in part[: len(self.owned(rank))]
        )

    def collect(self, rows: list[Tensor]) -> Tensor:
        """Put the rows (n, m) of all shards together, given those of this process, a tensor per shard."""
        mine = iter(rows)
        counts = [count for counts in self.all([len(part) for part in rows]) for count in counts]
        owners = [rank for rank in range(self.size) for _ in self.owned(rank)]
        whole = rows[0].new_empty(sum(counts), rows[0].shape[1])
        for part, owner in zip(whole.split(counts), owners, strict=True):
            if owner == self.rank:
                part.copy_(next(mine))
            if len(part):
                with self._together():
                    dist.broadcast(part.view(torch.uint8), owner)  # bytes: gloo does not know every dtype
        return whole

    def all(self, value: Result) -> list[Result]:
        """Return the values of all processes, by rank."""
        values: list[Any] = [None] * self.size
        with self._together():
            dist.all_gather_object(values, value)
        return values

    def on_first(self, function: Callable[[], Result]) -> Result:
        """Call a function on the first process alone and return its result, or raise its error, on all."""
        outcome: list[Any] = [None, None]
        error = None
        if self.rank == 0:
            try:
                with self.writing:
                    outcome[0] = function()
            except Exception as raised:
                error, outcome[1] = raised, f"{raised}"
        with self._together():
            dist.broadcast_object_list(outcome, 0)
        if error is not None:
            raise error
        if outcome[1] is not None:
            raise EverywhereError(outcome[1])
        return outcome[0]

    def agree(self, weights: Tensor) -> None:
        """Raise unless every process has the same weights."""
        sums = self.all(zlib.crc32(weights.cpu().numpy().tobytes()))
        if len(set(sums)) > 1:
            self.on_first(_disagree)

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch.distributed has no narrower kind in common
            self.lost = True
            # Of "[file:line] what happened. What that may mean ...", what happened.
            reason = re.sub(r"^\[[^]]*\] ", "", str(error).strip()).partition(". ")[0].partition("\n")[0]
            raise RankLostError(self.message(f" ({reason})")) from error

    def message(self, reason: str) -> str:
        """What is to be said when the run ends early."""
        return f"rank {self.rank}: another rank was lost{reason}; {self.kept}"

    def stop(self) -> None:
        """End the process at a SIGTERM, which torchrun sends when another process ended."""
        if self.lost:
            time.sleep(GRACE_SECONDS)  # it is about to say so itself
        else:
            self.writing.acquire(timeout=10)  # a file that is being written becomes whole
            message = self.message(", or the run was stopped (SIGTERM)")
            os.write(2, f"\nembkern: {message}\n".encode())
        os._exit(128 + signal.SIGTERM)


def _disagree() -> None:
    raise RuntimeError(
        "the processes no longer have the same weights: they round differently (other processors, or another "
        "version of torch or embkern); run them on machines of one kind"
    )


def launched() -> bool:
    """Whether torchrun, or whoever sets the same variables, started this process as one of a run."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


@contextlib.contextmanager
def joined(shards: int = SHARDS, timeout: float = TIMEOUT, device: str = "cpu") -> Iterator[DistributedWorld]:
    """Join the other processes that torchrun started, for the length of the block.

    Args:
        shards: into which the table is cut; the result depends on it, and on nothing else here.
        timeout: seconds after which a process that does not answer counts as lost; more than what one
            process does alone may take (``validate``, a checkpoint).
        device: type of the device that trains, ``"cpu"`` (gloo) or ``"cuda"`` (NCCL).

    Raises:
        ValueError: there are fewer shards than processes.
        RankLostError: from what is done in the block: another process is gone.
    """
    backend = "gloo" if device == "cpu" else f"cpu:gloo,{device}:nccl"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
    try:
        world = DistributedWorld(shards)
        with _stopping(world):
            try:
                yield world
            except EverywhereError:
                world.lost = True
                time.sleep(GRACE_SECONDS)  # the first process reports, before torchrun stops it
                raise
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _stopping(world: DistributedWorld) -> Iterator[None]:
    """Call ``world.stop`` at a SIGTERM, in a thread: the main one may be waiting for a process that is gone.

    After an error the handler stays, so that the SIGTERM that follows does not come before the report.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while signals := os.read(reader, 64):
            if signal.SIGTERM in signals:
                world.stop()

    threading.Thread(target=watch, daemon=True).start()
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    yield
    signal.set_wakeup_fd(descriptor)
    signal.signal(signal.SIGTERM, before)
    os.close(writer)

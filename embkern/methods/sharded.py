"""Distributed runs: processes divide the rows of a table, and all have the same result, bit for bit.

For the factors of ``autoencoder`` and ``direction`` the table is cut into a fixed number of shards, whatever
the number of processes. A process owns consecutive shards and reads only their rows. In a step of the
autoencoder every shard's gradient is summed over its rows of the batch; the gradients of all shards are
gathered and added in the order of the shards, and every process takes the same step of Adam. The result
depends on the number of shards, but not on the number of processes or threads. A step communicates and stores
shards x (parameters + 1) values on every process, so it is meant for large batches and steps on the whole
table. Everything that torch computes (the ELU variant, the final codes, and all steps without the native
extension) runs on one thread per process. Processors of different kinds may round differently, which
``check_equal_weights`` detects.

``allocate`` divides blocks of rows among the processes in turns. Each quantises its own blocks, which are
then merged, and sums over blocks are added in the order of the blocks. What is decided for the whole table,
the basis and the rate of every row, is decided by the first process. The result does not depend on shards.
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

SHARDS = 8  # default number of shards of a table
TIMEOUT = 60.0  # seconds to wait for another process
_MERGED = 2**24  # values that are merged at a time
_ADDED = 2**18  # values that are added at a time: torch first converts all of them to the dtype of the sum
GRACE_SECONDS = 2.0  # for another process to report its error before torchrun stops it

# torch 2.10 lacks all_gather_single, and torch 2.13 deprecates all_gather_into_tensor.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Result = TypeVar("Result")


class RankLostError(RuntimeError):
    """Another process of the run was lost; the message says what the checkpoint holds and how to resume."""


class FirstProcessError(RuntimeError):
    """An error of the first process, raised on the other processes; only the first process reports it."""

    reported_by_first_process = True


class Section(NamedTuple):
    """Consecutive rows of a table, and the id of the first of them."""

    start: int
    rows: Rows


class World:
    """The processes of a run and the shards of its table; this class is a single process with all shards.

    Attributes:
        rank: index of this process.
        size: the number of processes.
        shards: the number of shards; with more than one, gradients are summed shard by shard.
        checkpoint_status: what the run's checkpoint holds, for the message when a process is lost.
    """

    rank, size = 0, 1

    def __init__(self, shards: int = 1) -> None:
        if shards < self.size:
            raise ValueError(f"shards: expected at least one per process ({self.size}), got {shards}")
        self.shards = shards
        self.checkpoint_status = "nothing is kept yet"

    def owned(self, rank: int | None = None) -> range:
        """Return the shards of a process, by default of this one."""
        rank = self.rank if rank is None else rank
        return range(self.shards * rank // self.size, self.shards * (rank + 1) // self.size)

    def sections(self, rows: Rows) -> list[Section]:
        """Cut a table (V, H) into shards and return those of this process."""
        bounds = [len(rows) * shard // self.shards for shard in range(self.shards + 1)]
        cut = rows.section if isinstance(rows, TableFile) else lambda start, stop: rows[start:stop]
        return [Section(bounds[shard], cut(bounds[shard], bounds[shard + 1])) for shard in self.owned()]

    def sum(self, vectors: Iterable[Tensor]) -> Tensor:
        """Add a vector (n,) per shard in the order of the shards, given the vectors of this process."""
        vectors = iter(vectors)
        total = next(vectors).clone()
        for vector in vectors:
            total += vector
        return total

    def gather_rows(self, rows: list[Tensor]) -> Tensor:
        """Concatenate the rows (n, m) of all shards, given a tensor per shard of this process."""
        return torch.cat(rows)

    def gather(self, value: Result) -> list[Result]:
        """Return the values of all processes in order of rank."""
        return [value]

    def own_blocks(self, count: int) -> range:
        """Return the numbers of the blocks of rows that belong to this process, which take turns."""
        return range(self.rank, count, self.size)

    def sum_blocks(self, parts: Iterable[Iterable[Tensor]], count: int, size: int) -> Tensor:
        """Add a vector (size,) per block in float64, in the order of the blocks.

        Args:
            parts: of the blocks of this process, each the tensors whose values in a row are the vector. They
                are taken when their turn comes, so that one of them is in memory at a time.
            count: the number of blocks of all processes.
            size: the number of values.
        """
        total = torch.zeros(size, dtype=torch.float64)
        for part in parts:
            _add(total, part)
        return total

    def merge(self, tensor: Tensor) -> Tensor:
        """Fill in, in place, what other processes have of a tensor; each has zeros where it has nothing."""
        return tensor

    def on_first(self, function: Callable[[], Result]) -> Result:
        """Call a function on the first process; return its result, or raise its error, on all processes."""
        return function()

    def check_equal_arguments(self, describe: Callable[[], dict[str, Any]]) -> None:
        """Raise on all processes unless they describe their arguments, by name, alike.

        A process alone describes nothing, as that may read the whole table.

        Raises:
            ValueError: descriptions differ, or ``describe`` raised an error on another process.
            Exception: what ``describe`` raised on this process.
        """

    def check_equal_weights(self, weights: Tensor) -> None:
        """Raise RuntimeError unless all processes have the same weights."""

    @contextlib.contextmanager
    def one_thread(self, needed: bool = True) -> Iterator[None]:
        """Use one CPU thread in the block if the table is sharded: the sums of BLAS depend on their number.

        torchrun starts a single process with all cores as threads, and several processes with one thread
        each, unless OMP_NUM_THREADS is set.
        """
        before = torch.get_num_threads()
        if needed and self.shards > 1:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


class DistributedWorld(World):
    """The processes of a group of torch.distributed, with gloo for CPU tensors and NCCL for CUDA.

    Args:
        shards: the number of shards; None for one per process.
        group: the processes; None for the default group, which ``joined`` makes of those of torchrun.

    Raises:
        ValueError: there are fewer shards than processes, this process is not in the group, or the group does
            not send CPU tensors.
    """

    def __init__(self, shards: int | None = None, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.size, self.group = dist.get_rank(group), dist.get_world_size(group), group
        if self.rank < 0:
            raise ValueError("group: expected one that this process is in")
        if "cpu:" not in (backends := dist.get_backend_config(group)):
            raise ValueError(f"group: expected one that sends CPU tensors (cpu:gloo), got {backends}")
        super().__init__(self.size if shards is None else shards)
        self.failing = False  # whether this process is about to report an error and end
        self.write_lock = threading.Lock()  # held while the first process writes files

    def sum(self, vectors: Iterable[Tensor]) -> Tensor:
        """Add a vector (n,) per shard in the order of the shards, given the vectors of this process."""
        owned = torch.stack(list(vectors))
        padded = owned.new_zeros(-(-self.shards // self.size), owned.shape[1])  # equal sizes on all processes
        padded[: len(owned)] = owned
        gathered = padded.new_empty(self.size, *padded.shape)
        with self._collective():
            _ALL_GATHER(gathered.view(-1), padded.view(-1), group=self.group)
        return super().sum(
            vector for rank, part in enumerate(gathered) for vector in part[: len(self.owned(rank))]
        )

    def gather_rows(self, rows: list[Tensor]) -> Tensor:
        """Concatenate the rows (n, m) of all shards, given a tensor per shard of this process."""
        own = iter(rows)
        counts = [count for counts in self.gather([len(part) for part in rows]) for count in counts]
        owners = [rank for rank in range(self.size) for _ in self.owned(rank)]
        whole = rows[0].new_empty(sum(counts), rows[0].shape[1])
        for part, owner in zip(whole.split(counts), owners, strict=True):
            if owner == self.rank:
                part.copy_(next(own))
            if len(part):
                with self._collective():
                    # as bytes, since gloo lacks some dtypes
                    dist.broadcast(part.view(torch.uint8), self._global(owner), group=self.group)
        return whole

    def gather(self, value: Result) -> list[Result]:
        """Return the values of all processes in order of rank."""
        values: list[Any] = [None] * self.size
        with self._collective():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def on_first(self, function: Callable[[], Result]) -> Result:
        """Call a function on the first process; return its result, or raise its error, on all processes."""
        outcome: list[Any] = [None, None]
        error = None
        if self.rank == 0:
            try:
                with self.write_lock:
                    outcome[0] = function()
            except Exception as raised:
                error, outcome[1] = raised, f"{raised}"
        with self._collective():
            dist.broadcast_object_list(outcome, self._global(0), group=self.group)
        if error is not None:
            raise error
        if outcome[1] is not None:
            raise FirstProcessError(outcome[1])
        return outcome[0]

    def check_equal_weights(self, weights: Tensor) -> None:
        """Raise RuntimeError unless all processes have the same weights."""
        checksums = self.gather(zlib.crc32(weights.cpu().numpy().tobytes()))
        if len(set(checksums)) > 1:
            self.on_first(_raise_unequal_weights)

    def sum_blocks(self, parts: Iterable[Iterable[Tensor]], count: int, size: int) -> Tensor:
        """Add a vector (size,) per block in float64, in the order of the blocks."""
        total, own = torch.zeros(size, dtype=torch.float64), iter(parts)
        gathered = torch.empty(self.size, size, dtype=torch.float64)
        for first in range(0, count, self.size):
            vector = torch.zeros_like(total)
            _add(vector, next(own, ()))
            with self._collective():
                _ALL_GATHER(gathered.view(-1), vector, group=self.group)
            for each in gathered[: count - first]:
                total += each
        return total

    def merge(self, tensor: Tensor) -> Tensor:
        """Fill in, in place, what other processes have of a tensor; each has zeros where it has nothing."""
        for part in tensor.view(-1).split(_MERGED):  # gloo's buffers are as large as what it sends
            with self._collective():
                dist.all_reduce(part, group=self.group)
        return tensor

    def check_equal_arguments(self, describe: Callable[[], dict[str, Any]]) -> None:
        """Raise on all processes unless they describe their arguments, by name, alike."""
        own, error = dict[str, Any](), None
        try:
            own = describe()
        except Exception as raised:
            error = raised
        described = self.gather(own if error is None else f"{error}")
        if error is not None:
            raise error
        for rank, other in enumerate(described):
            if isinstance(other, str):
                raise ValueError(f"rank {rank}: {other}")
            for name, value in other.items():
                if value != own[name]:
                    raise ValueError(
                        f"{name}: expected the same on all ranks, got {own[name]} on rank {self.rank} and "
                        f"{value} on rank {rank}"
                    )

    def _global(self, rank: int) -> int:
        """Return the rank in the default group of a process of this group."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    @contextlib.contextmanager
    def _collective(self) -> Iterator[None]:
        """Run a collective operation; its failure means that another process was lost."""
        try:
            yield
        except RuntimeError as error:  # the only base class that its backends' errors have in common
            self.failing = True
            # Messages have the form "[file:line] event. Hints ..."; keep the event.
            reason = re.sub(r"^\[[^]]*\] ", "", str(error).strip()).partition(". ")[0].partition("\n")[0]
            raise RankLostError(self.message(f" ({reason})")) from error

    def message(self, reason: str) -> str:
        """Return the message of a run that ends early."""
        return f"rank {self.rank}: another rank was lost{reason}; {self.checkpoint_status}"

    def stop(self) -> None:
        """End this process after a SIGTERM, which torchrun sends when another process has ended."""
        if self.failing:
            time.sleep(GRACE_SECONDS)  # lets the main thread report its error
        else:
            self.write_lock.acquire(timeout=10)  # lets the first process finish a file
            message = self.message(", or the run was stopped (SIGTERM)")
            os.write(2, f"\nembkern: {message}\n".encode())
        os._exit(128 + signal.SIGTERM)


def _add(total: Tensor, part: Iterable[Tensor]) -> None:
    """Add tensors, whose values in a row are a vector, to a float64 vector in place."""
    first = 0
    for values in part:
        for some in values.reshape(-1).split(_ADDED):
            total[first : first + len(some)] += some
            first += len(some)


def _raise_unequal_weights() -> None:
    raise RuntimeError(
        "the processes no longer have the same weights: they round differently (other processors, or another "
        "version of torch or embkern); run them on machines of one kind"
    )


def launched() -> bool:
    """Return whether torchrun, or a launcher that sets the same variables, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


@contextlib.contextmanager
def joined(shards: int = SHARDS, timeout: float = TIMEOUT, device: str = "cpu") -> Iterator[DistributedWorld]:
    """Join the processes that torchrun started, for the length of the block.

    Args:
        shards: number of shards of the table; the only argument here on which the result depends.
        timeout: seconds after which a process that does not answer counts as lost. Work that the first
            process does alone (``validate``, a checkpoint) must take less.
        device: type of the training device, ``"cpu"`` (gloo) or ``"cuda"`` (NCCL).

    Raises:
        ValueError: there are fewer shards than processes.
        RankLostError: a collective operation in the block failed because another process was lost.
    """
    backend = "gloo" if device == "cpu" else f"cpu:gloo,{device}:nccl"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
    try:
        world = DistributedWorld(shards)
        with _stop_at_sigterm(world):
            try:
                yield world
            except FirstProcessError:
                world.failing = True
                time.sleep(GRACE_SECONDS)  # lets the first process report before torchrun stops it
                raise
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _stop_at_sigterm(world: DistributedWorld) -> Iterator[None]:
    """Call ``world.stop`` on SIGTERM in a thread, as the main thread may be waiting for a lost process.

    After an error in the block the handler stays installed, so that the SIGTERM that follows does not end the
    process before it has reported the error.
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

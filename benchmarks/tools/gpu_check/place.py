"""The place where kernels run: a CUDA device; its replacement in a rehearsal is in `stand_in.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from embkern.experiments.timing import cuda_sampler, side_stream
from embkern.ops.backends import unavailable
from embkern.ops.library import overload

from ...machine import lost_context

Call = Callable[[], tuple[Tensor, ...]]


class Device:
    """The current CUDA device."""

    type = "cuda"
    rehearsal = False
    replays = "CUDA graph"

    def dtypes(self, backend: str) -> tuple[str, ...]:
        """Return the dtypes that a backend's kernels are checked in."""
        return ("bf16", "fp32")

    def unavailable(self, op: str, backend: str) -> str | None:
        """Return why a backend's kernels of an op cannot run here, or None if they can."""
        return unavailable(backend, op, self.type, torch.float32)

    def op(self, name: str, backend: str) -> Callable[..., Any]:
        """Return the raw op of one backend."""
        return overload(name, backend)

    def synchronize(self) -> None:
        """Wait for the kernels, and raise their errors."""
        torch.cuda.synchronize()

    def lost(self) -> str | None:
        """Return why nothing can run in this process any more, or None."""
        return lost_context()

    def form(self, by_gram: bool) -> contextlib.AbstractContextManager:
        """Select the form of the autoencoder's loss where the shape does not select it."""
        return contextlib.nullcontext()

    def release(self) -> None:
        """Free cached memory for the other processes."""
        torch.cuda.empty_cache()

    def replay(self, call: Call, change: Callable[[], None]) -> tuple[Tensor, ...]:
        """Capture ``call`` in a graph, ``change`` its inputs, and return the results of a replay."""
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        change()
        graph.replay()
        torch.cuda.synchronize()
        return tuple(each.clone() for each in captured)

    def time(self, call: Call, samples: int = 5) -> tuple[list[float], str]:
        """Return times of a call in microseconds, by CUDA events, around replays of a graph if possible."""
        with side_stream("cuda"):
            sample, timer = cuda_sampler([call])
            return [sample() for _ in range(samples)], timer


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Enable deterministic algorithms, under which the ops give the same bits in every run."""
    settings: Any = torch.utils.deterministic
    before = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within `deterministic`: fill new tensors with NaN, so that unwritten elements are detected."""
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = False

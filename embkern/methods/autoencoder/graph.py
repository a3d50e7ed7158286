"""Training steps captured in a CUDA graph: at batch 32 the launches of a step cost more than its work."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...ops.backends import select
from .objective import Objective
from .targets import Targets
from .weights import Adam, Weights

GRAPH_STEPS = 32  # steps in one graph, which share its launch and the copy of its ids

Replay = Callable[[], None]


def capture(function: Callable[[], None]) -> Replay:
    """Capture what ``function`` launches on the current CUDA device, and return the graph's ``replay``.

    The function runs once on a side stream before the capture, because kernels compile and libraries allocate
    at their first use, which a capture does not allow.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


class GraphSteps:
    """The steps of ``TorchSteps``, replayed from a CUDA graph of GRAPH_STEPS steps; without activation.

    The graph reads the learning rate, the ids and the number of steps from tensors. Everything else is part
    of it, so another alpha (the authors' configuration has 21 values), batch size, table or weights needs a
    new capture. The remaining steps, too few for a graph, run without one.
    """

    def __init__(
        self,
        weights: Weights,
        objective: Objective,
        capture: Callable[[Callable[[], None]], Replay] = capture,
    ) -> None:
        self.weights, self.objective, self.capture = weights, objective, capture
        self.captured_for: tuple | None = None
        self.replay: Replay | None = None

    @staticmethod
    def unavailable(weights: Weights) -> str | None:
        """Return why this engine does not support the weights, or None."""
        if not weights.parameters.is_cuda:
            return f"a CUDA graph needs CUDA tensors, not {weights.parameters.device.type}"
        if weights.activation is not None:
            return f"the captured steps have no activation ({weights.activation!r} was asked for)"
        return None

    @torch.no_grad()
    def run(self, targets: Targets, order: Tensor, batch_size: int, alpha: float, lr: float) -> Tensor:
        """Take the steps of ``order``; see ``Steps``."""
        device = targets.rows.device
        ids = order.to(device)
        whole = len(ids) // (GRAPH_STEPS * batch_size) * GRAPH_STEPS * batch_size
        losses = []
        if whole:
            self._prepare(targets, batch_size, alpha)
            assert self.replay is not None
            self._set_inputs(lr)
            for chunk in ids[:whole].split(GRAPH_STEPS * batch_size):
                self.ids.copy_(chunk.view(GRAPH_STEPS, batch_size))
                self.replay()
                losses.append(self.losses.clone())
            self.weights.step += whole // batch_size
        if whole < len(ids):
            optimizer = Adam(self.weights)
            rate = torch.full((), lr, device=device)
            batches = targets.batches(ids[whole:], batch_size)
            rest = [self._step(batch, alpha, optimizer, rate) for batch in batches]
            self.weights.step += len(rest)
            losses.append(torch.stack(rest))
        return torch.cat(losses)

    def _step(self, batch: Targets, alpha: float, optimizer: Adam, lr: Tensor) -> Tensor:
        backend = select("autoencoder", batch.rows.device.type, batch.rows.dtype)
        loss, gradients = self.objective.gradients(self.weights, batch, alpha, backend=backend)
        optimizer.update(gradients, lr)
        return loss

    def _prepare(self, targets: Targets, batch_size: int, alpha: float) -> None:
        """Capture GRAPH_STEPS steps, unless the current graph is for the same arguments."""
        weights, rows = self.weights, targets.rows
        addresses = (rows.data_ptr(), targets.norms.data_ptr(), weights.parameters.data_ptr())
        wanted = (*addresses, rows.shape, batch_size, alpha)
        if self.captured_for == wanted:
            return
        self.replay = None  # frees the memory of the old graph before the capture
        self.ids = torch.zeros(GRAPH_STEPS, batch_size, dtype=torch.int64, device=rows.device)
        self.losses = torch.zeros(GRAPH_STEPS, dtype=rows.dtype, device=rows.device)
        self.lr = torch.zeros((), device=rows.device)
        self.optimizer = Adam(weights)
        before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in weights.state().items()}

        def steps() -> None:
            for k, batch in enumerate(targets.batches(self.ids.view(-1), batch_size)):
                self.losses[k] = self._step(batch, alpha, self.optimizer, self.lr)

        self.replay = self.capture(steps)
        weights.load(before)  # undoes the steps on row 0 that ran before the capture
        self.captured_for = wanted

    def _set_inputs(self, lr: float) -> None:
        """Write the learning rate and the number of steps to the tensors that the graph reads."""
        self.lr.fill_(lr)
        for count in (*self.optimizer.count, *self.optimizer.counts):
            count.fill_(self.weights.step)

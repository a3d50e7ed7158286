"""Training steps captured in a CUDA graph: at batch 32 a step is a dozen launches and next to no work."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...ops.backends import select
from .steps import Adam, Objective, Weights

GRAPH_STEPS = 32  # in one graph: its launch and the copy of its ids are shared by so many steps

Replay = Callable[[], None]


def capture(function: Callable[[], None]) -> Replay:
    """Capture what ``function`` launches on the current CUDA device; the returned call launches it again.

    The function runs once before, on a side stream: kernels compile and libraries allocate at their first
    use, which a capture must not see.
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
    """The steps of ``TorchSteps``, GRAPH_STEPS at a time from a CUDA graph; without activation.

    The learning rate, the ids and the count of steps are tensors that the graph reads. The rest is in it:
    another alpha (the authors' recipe has 21), batch size, table or weights capture anew. Steps that do not
    fill a graph run without one.
    """

    def __init__(
        self,
        weights: Weights,
        objective: Objective,
        capture: Callable[[Callable[[], None]], Replay] = capture,
    ) -> None:
        self.weights, self.objective, self.capture = weights, objective, capture
        self.captured: tuple | None = None
        self.replay: Replay | None = None

    @staticmethod
    def unavailable(weights: Weights) -> str | None:
        """Return why this engine cannot serve, or None."""
        if not weights.parameters.is_cuda:
            return f"a CUDA graph needs CUDA tensors, not {weights.parameters.device.type}"
        if weights.activation is not None:
            return f"the captured steps have no activation ({weights.activation!r} was asked for)"
        return None

    @torch.no_grad()
    def run(self, rows: Tensor, order: Tensor, batch_size: int, alpha: float, lr: float) -> Tensor:
        """Take the steps of ``order``; see ``Steps``."""
        ids = order.to(rows.device)
        whole = len(ids) // (GRAPH_STEPS * batch_size) * GRAPH_STEPS * batch_size
        losses = []
        if whole:
            self._prepare(rows, batch_size, alpha)
            assert self.replay is not None
            self._set(lr)
            for chunk in ids[:whole].split(GRAPH_STEPS * batch_size):
                self.ids.copy_(chunk.view(GRAPH_STEPS, batch_size))
                self.replay()
                losses.append(self.losses.clone())
            self.weights.step += whole // batch_size
        if whole < len(ids):
            optimizer = Adam(self.weights)
            rate = torch.full((), lr, device=rows.device)
            rest = [
                self._step(rows, batch, alpha, optimizer, rate) for batch in ids[whole:].split(batch_size)
            ]
            self.weights.step += len(rest)
            losses.append(torch.stack(rest))
        return torch.cat(losses)

    def _step(self, rows: Tensor, ids: Tensor, alpha: float, optimizer: Adam, lr: Tensor) -> Tensor:
        backend = select("autoencoder", rows.device.type, rows.dtype)
        batch = rows.index_select(0, ids)
        loss, gradients = self.objective.gradients(self.weights, batch, alpha, backend=backend)
        optimizer.update(gradients, lr)
        return loss

    def _prepare(self, rows: Tensor, batch_size: int, alpha: float) -> None:
        """Capture GRAPH_STEPS steps unless that is done."""
        weights = self.weights
        wanted = (rows.data_ptr(), rows.shape, weights.parameters.data_ptr(), batch_size, alpha)
        if self.captured == wanted:
            return
        self.replay = None  # frees the memory of the old graph first
        self.ids = torch.zeros(GRAPH_STEPS, batch_size, dtype=torch.int64, device=rows.device)
        self.losses = torch.zeros(GRAPH_STEPS, dtype=rows.dtype, device=rows.device)
        self.lr = torch.zeros((), device=rows.device)
        self.optimizer = Adam(weights)
        before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in weights.state().items()}

        def steps() -> None:
            for k in range(GRAPH_STEPS):
                self.losses[k] = self._step(rows, self.ids[k], alpha, self.optimizer, self.lr)

        self.replay = self.capture(steps)
        weights.load(before)  # the run before the capture has trained on row 0
        self.captured = wanted

    def _set(self, lr: float) -> None:
        self.lr.fill_(lr)
        for count in (*self.optimizer.count, *self.optimizer.counts):
            count.fill_(self.weights.step)

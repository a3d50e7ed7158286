"""The engines that take training steps, and the choice of one for a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ...ops.backends import select, unavailable
from ...ops.library import NAMESPACE, overload
from .graph import GraphSteps
from .objective import Objective
from .targets import Targets
from .weights import ADAM_EPS, BETA1, BETA2, Adam, Weights


class Steps(Protocol):
    """An engine that is bound to its weights and objective."""

    def run(self, targets: Targets, order: Tensor, batch_size: int, alpha: float, lr: float) -> Tensor:
        """Take a step for every ``batch_size`` ids of ``order``; the last step may have fewer ids.

        The result has the same bits however an order is cut into calls, if each has whole batches.

        Args:
            targets: rows (V, H), contiguous, fp32 or float64, on the weights' device, and their norms. The
                same tensors in every call save a new capture of CUDA graphs.
            order: int64 ids of rows, on the CPU.
            batch_size: rows per step.
            alpha: exponent of the power term.
            lr: Adam's learning rate.

        Returns:
            The loss before each step, (steps,), on the device of the rows.
        """
        ...


class TorchSteps:
    """Steps of one raw op and a fused Adam each, for any device, dtype and activation."""

    def __init__(self, weights: Weights, objective: Objective) -> None:
        self.weights, self.objective = weights, objective

    @staticmethod
    def unavailable(weights: Weights) -> str | None:
        """Return why this engine does not support the weights, or None."""
        return None

    @torch.no_grad()
    def run(self, targets: Targets, order: Tensor, batch_size: int, alpha: float, lr: float) -> Tensor:
        """Take the steps of ``order``; see ``Steps``."""
        weights, device = self.weights, targets.rows.device
        backend = select("autoencoder", device.type, targets.rows.dtype)
        optimizer, losses = Adam(weights), []
        with _threads_for(batch_size * weights.width * weights.rank):
            for batch in targets.batches(order.to(device), batch_size):
                loss, gradients = self.objective.gradients(weights, batch, alpha, backend=backend)
                optimizer.step(gradients, lr)
                losses.append(loss)
        return torch.stack(losses)


class NativeSteps:
    """All steps of an order in one call of a C++ op; CPU only, without activation."""

    def __init__(self, weights: Weights, objective: Objective) -> None:
        self.weights, self.objective = weights, objective

    @staticmethod
    def unavailable(weights: Weights) -> str | None:
        """Return why this engine does not support the weights, or None."""
        if weights.activation is not None:
            return f"the native steps have no activation ({weights.activation!r} was asked for)"
        if not weights.parameters.is_cpu:
            return f"the native steps run on the CPU, not on {weights.parameters.device}"
        if reason := unavailable("native", "autoencoder", "cpu", weights.parameters.dtype):
            return reason
        op = f"{NAMESPACE}::autoencoder_train.native"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(op, "CPU"):
            return "the native extension was built without the training steps; build it again"
        return None

    @torch.no_grad()
    def run(self, targets: Targets, order: Tensor, batch_size: int, alpha: float, lr: float) -> Tensor:
        """Take the steps of ``order``; see ``Steps``."""
        weights, objective = self.weights, self.objective
        losses = overload("autoencoder_train", "native")(
            targets.rows,
            order,
            batch_size,
            weights.parameters,
            weights.first_moment,
            weights.second_moment,
            weights.rank,
            weights.step,
            lr,
            BETA1,
            BETA2,
            ADAM_EPS,
            *objective.term_weights,
            alpha,
            objective.eps,
        )
        weights.step += len(losses)
        return losses


@contextlib.contextmanager
def _threads_for(multiplications: int) -> Iterator[None]:
    """Use at most one CPU thread per 2**20 multiplications of a step.

    A step of batch 32 is as fast on one thread as on two. Where another process occupies the second core it
    is five times as fast, because two threads wait for each other in each of its dozen small ops.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, multiplications // 2**20)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


# The engines by name, in order of preference.
ENGINES: dict[str, type[NativeSteps] | type[GraphSteps] | type[TorchSteps]] = {
    "native": NativeSteps,
    "graph": GraphSteps,
    "torch": TorchSteps,
}


def select_engine(engine: str | None, weights: Weights) -> str:
    """Return the requested engine, or the first that supports the weights and follows ``EMBKERN_BACKEND``.

    Raises:
        ValueError: there is no such engine.
        RuntimeError: the requested engine does not support the weights; the message says why.
    """
    if engine is not None and engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    backend = select("autoencoder", weights.parameters.device.type, weights.parameters.dtype)
    for name, kind in ENGINES.items():
        reason = kind.unavailable(weights)
        if engine == name and reason:
            raise RuntimeError(f"engine: {name!r} cannot serve this run: {reason}")
        if engine == name or (engine is None and not reason and (name != "native" or backend == "native")):
            return name
    raise AssertionError("the torch engine supports all weights")

"""The autoencoder's weights as one flat tensor, its objective, and the engines that take training steps.

An engine is bound to weights and an objective; ``run`` takes all steps of an order of rows. engines.py lists
them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adam import adam

from ...ops import cosine_mse_loss
from ...ops.autoencoder import autoencoder_forward
from ...ops.backends import select, unavailable
from ...ops.library import NAMESPACE, overload
from ...ops.reference import MEAN, SUM
from ...tables.factors import activate

BETA1, BETA2, ADAM_EPS = 0.9, 0.999, 1e-8  # Adam's, torch's defaults
PART_ROWS = 1024  # of a block whose sums plain torch takes, with a dozen temporaries of the rows' size


class Weights:
    """Encoder and decoder of an autoencoder as one flat tensor, with Adam's moments of the same layout.

    Attributes:
        rank: r.
        width: H.
        activation: None or ``"elu"``, after the encoder and after the decoder.
        parameters: (2rH + r + H,): encoder_weight (r, H), encoder_bias (r), basis (r, H), offset (H).
        first_moment, second_moment: Adam's, like ``parameters``.
        step: optimizer steps done.
    """

    def __init__(self, parameters: Tensor, rank: int, width: int, activation: str | None = None) -> None:
        self.rank, self.width, self.activation = rank, width, activation
        self.parameters = parameters
        self.first_moment = torch.zeros_like(parameters)
        self.second_moment = torch.zeros_like(parameters)
        self.step = 0

    @classmethod
    def random(cls, rank: int, width: int, activation: str | None = None) -> Weights:
        """Draw what ``nn.Linear(H, r)`` and then ``nn.Linear(r, H)`` draw, on the CPU."""
        with torch.device("cpu"):
            encoder, decoder = nn.Linear(width, rank), nn.Linear(rank, width)
        parts = (encoder.weight, encoder.bias, decoder.weight.t(), decoder.bias)
        return cls(torch.cat([part.detach().reshape(-1) for part in parts]), rank, width, activation)

    def to(self, device: torch.device, dtype: torch.dtype) -> Weights:
        """Return weights that have taken no step, with the parameters moved or cast."""
        return Weights(self.parameters.to(device, dtype), self.rank, self.width, self.activation)

    def parts(self, flat: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views of encoder_weight, encoder_bias, basis, offset in a flat tensor (the parameters)."""
        r, H = self.rank, self.width
        parts = (self.parameters if flat is None else flat).split((r * H, r, r * H, H))
        return parts[0].view(r, H), parts[1], parts[2].view(r, H), parts[3]

    @property
    def basis(self) -> Tensor:
        """The decoder's weight, transposed: (r, H)."""
        return self.parts()[2]

    @property
    def offset(self) -> Tensor:
        """The decoder's bias: (H,)."""
        return self.parts()[3]

    def encode(self, rows: Tensor) -> Tensor:
        """Return the codes (N, r) of rows (N, H)."""
        encoder_weight, encoder_bias = self.parts()[:2]
        return activate(F.linear(rows, encoder_weight, encoder_bias), self.activation)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the reconstruction (N, H)."""
        basis, offset = self.parts()[2:]
        return activate(torch.addmm(offset, codes, basis), self.activation)

    @torch.no_grad()
    def start_at(self, basis: Tensor) -> None:
        """Start at the projection onto the rows of an orthonormal basis (r, H)."""
        encoder_weight, encoder_bias, decoder, offset = self.parts()
        encoder_weight.copy_(basis)
        decoder.copy_(basis)
        encoder_bias.zero_()
        offset.zero_()

    def state(self) -> dict[str, Any]:
        """Everything that goes on from here: the flat tensors themselves, no copies."""
        tensors = {name: getattr(self, name) for name in ("parameters", "first_moment", "second_moment")}
        return {**tensors, "step": self.step}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` returned."""
        for name in ("parameters", "first_moment", "second_moment"):
            getattr(self, name).copy_(state[name])
        self.step = state["step"]


class Adam:
    """Adam with torch's defaults on the weights, for as many steps as an engine's ``run`` takes.

    The count of steps is a tensor that the fused kernel reads; it is made once per run, not once per step.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        flat = (weights.parameters, weights.first_moment, weights.second_moment)
        self.flat = [[tensor] for tensor in flat]
        self.parts = [list(weights.parts(tensor)) for tensor in flat]
        count = torch.full((), weights.step, dtype=torch.float32, device=weights.parameters.device)
        self.count, self.counts = [count], [count.clone() for _ in range(4)]

    def step(self, gradients: list[Tensor], lr: float) -> None:
        """Take a step with the flat gradient, or with the gradients of the four parts."""
        self.update(gradients, lr)
        self.weights.step += 1

    def update(self, gradients: list[Tensor], lr: float | Tensor) -> None:
        """Do what a step does to tensors; the weights' own count of steps stays."""
        whole = len(gradients) == 1
        parameters, first, second = self.flat if whole else self.parts
        adam(
            parameters, gradients, first, second, [], self.count if whole else self.counts,
            fused=True, amsgrad=False, maximize=False, weight_decay=0.0,
            lr=lr, beta1=BETA1, beta2=BETA2, eps=ADAM_EPS,
        )  # fmt: skip


@dataclass(frozen=True)
class Objective:
    """The loss of ``autoencoder``: four weights, and the lower bound of |x||y| in the cosine."""

    cosine_weight: float
    mse_weight: float
    rmse_weight: float
    power_weight: float
    eps: float

    def gradients(
        self, weights: Weights, rows: Tensor, alpha: float, reduction: int = MEAN, backend: str | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Loss of a block of rows, and its gradients of the weights' four parts."""
        if reduction == SUM and len(rows) > PART_ROWS and self.by_blas(weights):
            return self._gradients_in_parts(weights, rows, alpha)
        backend = backend or select("autoencoder", rows.device.type, rows.dtype)
        if weights.activation is None and backend != "torch":
            terms, _, *gradients = autoencoder_forward(
                rows,
                (None, *weights.parts()),
                (reduction, *self.term_weights, alpha, self.eps),
                needs_grad=True,
                backend=backend,
            )
            return terms[0], gradients
        parts = [part.detach().requires_grad_() for part in weights.parts()]
        with torch.enable_grad():
            codes = activate(F.linear(rows, *parts[:2]), weights.activation)
            output = activate(torch.addmm(parts[3], codes, parts[2]), weights.activation)
            loss = self._of(output, rows, alpha, "mean" if reduction == MEAN else "sum")
        return loss.detach(), list(torch.autograd.grad(loss, parts))

    def _gradients_in_parts(
        self, weights: Weights, rows: Tensor, alpha: float
    ) -> tuple[Tensor, list[Tensor]]:
        first, *others = rows.split(PART_ROWS)
        loss, gradients = self.gradients(weights, first, alpha, SUM)
        for part in others:
            more, each = self.gradients(weights, part, alpha, SUM)
            loss = loss + more
            for gradient, addition in zip(gradients, each, strict=True):
                gradient += addition
        return loss, gradients

    def sums(self, weights: Weights, rows: Tensor, alpha: float) -> Tensor:
        """Sums over a block of rows of cosine distance, squared error (mean over H) and power term: (3,).

        The power term is 0 where its weight is.
        """
        if len(rows) > PART_ROWS and self.by_blas(weights):
            parts = rows.split(PART_ROWS)
            return torch.stack([self.sums(weights, part, alpha) for part in parts]).sum(0)
        if weights.activation is None:
            backend = select("autoencoder", rows.device.type, rows.dtype)
            options = (SUM, 0.0, 0.0, 0.0, self.power_weight, alpha, self.eps)
            parameters = (None, *weights.parts())
            return autoencoder_forward(rows, parameters, options, needs_grad=False, backend=backend)[0][1:]
        output = weights.decode(weights.encode(rows))
        only = Objective(0.0, 0.0, 0.0, 0.0, self.eps)
        sums = [
            dataclasses.replace(only, **{name: 1.0})._of(output, rows, alpha, "sum")
            for name in ("cosine_weight", "mse_weight", "power_weight")
            if name != "power_weight" or self.power_weight
        ]
        return torch.stack(sums + [torch.zeros_like(sums[0])] * (3 - len(sums)))

    def by_blas(self, weights: Weights) -> bool:
        """Whether plain torch computes the gradients; no op of embkern depends on the number of threads."""
        flat = weights.parameters
        return (
            weights.activation is not None or select("autoencoder", flat.device.type, flat.dtype) == "torch"
        )

    @property
    def term_weights(self) -> tuple[float, float, float, float]:
        """The four weights, in the order of the raw ops."""
        return self.cosine_weight, self.mse_weight, self.rmse_weight, self.power_weight

    def value(self, direction: float, squared: float, power: float) -> float:
        """The loss of the means of the three terms."""
        return (
            self.cosine_weight * direction
            + self.mse_weight * squared
            + self.rmse_weight * squared**0.5
            + self.power_weight * power
        )

    def _of(self, output: Tensor, rows: Tensor, alpha: float, reduction: Literal["mean", "sum"]) -> Tensor:
        return cosine_mse_loss(
            output,
            rows,
            cosine_weight=self.cosine_weight,
            mse_weight=self.mse_weight,
            rmse_weight=self.rmse_weight,
            power_weight=self.power_weight,
            alpha=alpha,
            eps=self.eps,
            reduction=reduction,
        )


class Steps(Protocol):
    """An engine, bound to its weights and objective."""

    def run(self, rows: Tensor, order: Tensor, batch_size: int, alpha: float, lr: float) -> Tensor:
        """Take one step per ``batch_size`` ids of ``order``, the last of which may have fewer.

        How an order is cut into runs of whole batches changes no bit of the result.

        Args:
            rows: (V, H), contiguous, fp32 or float64, on the weights' device; the same tensor at every call
                unless the table is streamed.
            order: int64 ids of rows, on the CPU.
            batch_size: rows per step.
            alpha: exponent of the power term.
            lr: Adam's learning rate.

        Returns:
            The losses before each step, (steps,), on the rows' device.
        """
        ...


class TorchSteps:
    """One raw op for loss and gradients and a fused Adam per step: any device, dtype and activation."""

    def __init__(self, weights: Weights, objective: Objective) -> None:
        self.weights, self.objective = weights, objective

    @staticmethod
    def unavailable(weights: Weights) -> str | None:
        """Return why this engine cannot serve, or None."""
        return None

    @torch.no_grad()
    def run(self, rows: Tensor, order: Tensor, batch_size: int, alpha: float, lr: float) -> Tensor:
        """Take the steps of ``order``; see ``Steps``."""
        weights = self.weights
        backend = select("autoencoder", rows.device.type, rows.dtype)
        optimizer, losses = Adam(weights), []
        with _threads_for(batch_size * weights.width * weights.rank):
            for ids in order.to(rows.device).split(batch_size):
                loss, gradients = self.objective.gradients(
                    weights, rows.index_select(0, ids), alpha, backend=backend
                )
                optimizer.step(gradients, lr)
                losses.append(loss)
        return torch.stack(losses)


class NativeSteps:
    """All steps of an order in one call of a C++ op on the CPU, in fp32 or float64, without activation."""

    def __init__(self, weights: Weights, objective: Objective) -> None:
        self.weights, self.objective = weights, objective

    @staticmethod
    def unavailable(weights: Weights) -> str | None:
        """Return why this engine cannot serve, or None."""
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
    def run(self, rows: Tensor, order: Tensor, batch_size: int, alpha: float, lr: float) -> Tensor:
        """Take the steps of ``order``; see ``Steps``."""
        weights, objective = self.weights, self.objective
        losses = overload("autoencoder_train", "native")(
            rows,
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
    """Use no more CPU threads than a step has work for, a million multiplications each.

    A step of batch 32 is as fast on one thread as on two, and five times faster where another process keeps
    the second core busy: the threads would wait for each other at every one of its dozen small ops.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, multiplications // 2**20)))
    try:
        yield
    finally:
        torch.set_num_threads(before)

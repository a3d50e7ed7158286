"""The weights of an autoencoder as one flat tensor, and Adam on them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adam import adam

from ...tables.factors import activate

BETA1, BETA2, ADAM_EPS = 0.9, 0.999, 1e-8  # of Adam; torch's defaults


class Weights:
    """Encoder and decoder of an autoencoder in one flat tensor, with Adam's moments in the same layout.

    Attributes:
        rank: r.
        width: H.
        activation: None or ``"elu"``, applied after the encoder and after the decoder.
        parameters: (2rH + r + H,): encoder_weight (r, H), encoder_bias (r,), basis (r, H), offset (H,).
        first_moment: of Adam, in the layout of ``parameters``.
        second_moment: of Adam, in the layout of ``parameters``.
        step: the number of optimizer steps taken.
    """

    def __init__(self, parameters: Tensor, rank: int, width: int, activation: str | None = None) -> None:
        self.rank, self.width, self.activation = rank, width, activation
        self.parameters = parameters
        self.first_moment = torch.zeros_like(parameters)
        self.second_moment = torch.zeros_like(parameters)
        self.step = 0

    @classmethod
    def random(cls, rank: int, width: int, activation: str | None = None) -> Weights:
        """Initialise like ``nn.Linear(H, r)`` followed by ``nn.Linear(r, H)``, on the CPU."""
        with torch.device("cpu"):
            encoder, decoder = nn.Linear(width, rank), nn.Linear(rank, width)
        parts = (encoder.weight, encoder.bias, decoder.weight.t(), decoder.bias)
        return cls(torch.cat([part.detach().reshape(-1) for part in parts]), rank, width, activation)

    def to(self, device: torch.device, dtype: torch.dtype) -> Weights:
        """Return weights with the parameters moved or cast, zero moments and no steps."""
        return Weights(self.parameters.to(device, dtype), self.rank, self.width, self.activation)

    def parts(self, flat: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return encoder_weight, encoder_bias, basis and offset as views of ``flat`` or the parameters."""
        r, H = self.rank, self.width
        parts = (self.parameters if flat is None else flat).split((r * H, r, r * H, H))
        return parts[0].view(r, H), parts[1], parts[2].view(r, H), parts[3]

    @property
    def basis(self) -> Tensor:
        """The transposed weight of the decoder, (r, H)."""
        return self.parts()[2]

    @property
    def offset(self) -> Tensor:
        """The bias of the decoder, (H,)."""
        return self.parts()[3]

    def encode(self, rows: Tensor) -> Tensor:
        """Return the codes (N, r) of rows (N, H)."""
        encoder_weight, encoder_bias = self.parts()[:2]
        return activate(F.linear(rows, encoder_weight, encoder_bias), self.activation)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the reconstruction (N, H) of codes (N, r)."""
        basis, offset = self.parts()[2:]
        return activate(torch.addmm(offset, codes, basis), self.activation)

    @torch.no_grad()
    def set_projection(self, basis: Tensor) -> None:
        """Set the weights to the projection onto the rows of an orthonormal basis (r, H)."""
        encoder_weight, encoder_bias, decoder, offset = self.parts()
        encoder_weight.copy_(basis)
        decoder.copy_(basis)
        encoder_bias.zero_()
        offset.zero_()

    def state(self) -> dict[str, Any]:
        """Return everything that training resumes from; the tensors are not copied."""
        tensors = {name: getattr(self, name) for name in ("parameters", "first_moment", "second_moment")}
        return {**tensors, "step": self.step}

    def load(self, state: dict[str, Any]) -> None:
        """Resume from what ``state`` returned."""
        for name in ("parameters", "first_moment", "second_moment"):
            getattr(self, name).copy_(state[name])
        self.step = state["step"]


class Adam:
    """Adam with torch's defaults, for the steps of one call of an engine's ``run``.

    The fused kernel reads the number of steps from a tensor, which is created once per call, not per step.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        flat = (weights.parameters, weights.first_moment, weights.second_moment)
        self.flat = [[tensor] for tensor in flat]
        self.parts = [list(weights.parts(tensor)) for tensor in flat]
        count = torch.full((), weights.step, dtype=torch.float32, device=weights.parameters.device)
        self.count, self.counts = [count], [count.clone() for _ in range(4)]

    def step(self, gradients: list[Tensor], lr: float) -> None:
        """Take a step, given the flat gradient or the gradients of the four parts."""
        self.update(gradients, lr)
        self.weights.step += 1

    def update(self, gradients: list[Tensor], lr: float | Tensor) -> None:
        """Update the tensors like ``step``, but leave ``weights.step`` unchanged."""
        whole = len(gradients) == 1
        parameters, first, second = self.flat if whole else self.parts
        adam(
            parameters, gradients, first, second, [], self.count if whole else self.counts,
            fused=True, amsgrad=False, maximize=False, weight_decay=0.0,
            lr=lr, beta1=BETA1, beta2=BETA2, eps=ADAM_EPS,
        )  # fmt: skip

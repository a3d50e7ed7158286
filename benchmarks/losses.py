"""The losses that ``cosine_mse`` and ``train`` compare: two forms in plain torch, and embkern's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from embkern.ops import cosine_mse_loss
from embkern.ops.backends import Backend, unavailable

from .peers import FORWARD, no_compiler
from .runner import assert_within, relative_error

# In fp16 the gradient of a mean underflows without a loss scale, which every trainer uses there.
LOSS_SCALE = {torch.float16: 2.0**15}


@dataclass(frozen=True)
class Terms:
    """Weights of the loss, named as the arguments of ``cosine_mse_loss``."""

    cosine_weight: float
    mse_weight: float = 0.0
    power_weight: float = 0.0
    alpha: float = 1.0
    eps: float = 1e-8


TERMS = {
    "cosine+mse": Terms(1.0, mse_weight=1.0),
    # The authors' recipe halfway through the fall of alpha from 1 to 0.1.
    "cosine+power": Terms(0.9975 / 5, power_weight=0.0025, alpha=0.55, eps=1e-6),
}


@dataclass
class Batch:
    """output (N, H), a leaf; target (N, H), with its norms, which a trainer knows beforehand."""

    output: Tensor
    target: Tensor
    norm: Tensor
    squared_norm: Tensor

    @classmethod
    def random(cls, N: int, H: int, dtype: torch.dtype, device: str, seed: int = 0) -> Batch:
        """Draw rows whose directions are similar in both, as those of a fit are."""
        generator = torch.Generator(device).manual_seed(seed)
        target, noise = (torch.randn(N, H, generator=generator, device=device) for _ in range(2))
        output = target + 0.5 * noise
        rounded = target.to(dtype)
        norm = torch.linalg.vector_norm(rounded, dim=1, dtype=torch.float32)
        return cls(output.to(dtype).requires_grad_(), rounded, norm, norm.square())


Loss = Callable[[Batch], Tensor]


def plain(output: Tensor, target: Tensor, terms: Terms, alpha: float | Tensor | None = None) -> Tensor:
    """Return the loss by its plain formula; a given ``alpha`` replaces that in ``terms``."""
    loss = terms.cosine_weight * (1 - F.cosine_similarity(output, target, dim=-1, eps=terms.eps)).mean()
    if terms.mse_weight:
        loss = loss + terms.mse_weight * F.mse_loss(output, target)
    return loss + _power(output - target, terms, alpha) if terms.power_weight else loss


def three_dot(
    output: Tensor,
    target: Tensor,
    squared_norm: Tensor | None,
    terms: Terms,
    alpha: float | Tensor | None = None,
) -> Tensor:
    """Return the loss from three dot products per row, in fp32, from which the squared error follows.

    Compiled, this was the fastest form of plain torch: squaring ``y - x`` takes about 1.2 times as long, and
    a separate mean of each term is no faster.
    """
    y, x = output.float(), target.float()
    dot, of_y = (y * x).sum(1), (y * y).sum(1)
    of_x = (x * x).sum(1) if squared_norm is None else squared_norm
    cosine = dot * torch.rsqrt((of_y * of_x).clamp_min(terms.eps**2))
    rows = terms.cosine_weight * (1 - cosine)
    if terms.mse_weight:
        rows = rows + (terms.mse_weight / y.shape[1]) * (of_y - 2 * dot + of_x)
    return rows.mean() + _power(y - x, terms, alpha) if terms.power_weight else rows.mean()


def _power(difference: Tensor, terms: Terms, alpha: float | Tensor | None) -> Tensor:
    exponent = terms.alpha if alpha is None else alpha
    return terms.power_weight * (difference.abs() + 1e-10).pow(exponent).mean()


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Any:
    # One graph per shape, as in a trainer with a fixed batch size.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=False, fullgraph=True)


def _plain(terms: Terms, wrap: Callable = lambda function: function) -> Loss:
    return lambda batch: wrap(plain)(batch.output, batch.target, terms)


def _three_dot(terms: Terms, wrap: Callable = lambda function: function, known: bool = False) -> Loss:
    return lambda batch: wrap(three_dot)(
        batch.output, batch.target, batch.squared_norm if known else None, terms
    )


def _embkern(terms: Terms, backend: Backend | None = None, known: bool = False) -> Loss:
    weights = vars(terms)
    return lambda batch: cosine_mse_loss(
        batch.output, batch.target, target_norm=batch.norm if known else None, backend=backend, **weights
    )


def _always(device: str, dtype: torch.dtype) -> None:
    return None


def _backend_reason(backend: str, device: str, dtype: torch.dtype) -> str | None:
    return unavailable(backend, "cosine_mse", device, dtype)


def _liger(device: str, dtype: torch.dtype) -> str:
    return (
        "LigerFusedLinearCosineSimilarityLoss is another loss: of the logits of two linear heads, summed and "
        "added to a cross-entropy; its cosine is plain torch under torch.compile, as in `compiled`"
    )


@dataclass(frozen=True)
class Provider:
    """How to build one competitor, when it can run, and which baselines it is compared with.

    A ``rival`` may be less exact than the eager three-dot form.
    """

    build: Callable[[Terms], Loss]
    reason: Callable[[str, torch.dtype], str | None] = _always
    baselines: tuple[str, ...] = ("three-dot", "three-dot-compiled")
    rival: bool = True


KNOWN = ("three-dot-norm-compiled",)
PROVIDERS: dict[str, Provider] = {
    "eager": Provider(_plain),
    "compiled": Provider(lambda terms: _plain(terms, _compiled), no_compiler),
    "three-dot": Provider(_three_dot),
    "three-dot-compiled": Provider(lambda terms: _three_dot(terms, _compiled), no_compiler),
    "three-dot-norm-compiled": Provider(
        lambda terms: _three_dot(terms, _compiled, known=True), no_compiler, KNOWN
    ),
    "liger": Provider(_plain, _liger),
    "embkern": Provider(_embkern, rival=False),
    **{
        f"embkern-{backend}": Provider(
            functools.partial(_embkern, backend=backend),
            functools.partial(_backend_reason, backend),
            rival=False,
        )
        for backend in get_args(Backend)
    },
    "embkern-norm": Provider(functools.partial(_embkern, known=True), baselines=KNOWN, rival=False),
}
COMPILED = tuple(name for name in PROVIDERS if name.endswith("compiled"))


def mode_call(mode: str, loss: Loss, batch: Batch) -> Callable[[], Any]:
    """Return the call that is timed: the loss, or the loss and its gradient of output."""
    if mode == FORWARD:
        return lambda: loss(batch)
    scale = LOSS_SCALE.get(batch.output.dtype)
    if scale is None:
        return lambda: torch.autograd.grad(loss(batch), batch.output)
    upstream = torch.full_like(loss(batch).detach(), scale)
    return lambda: torch.autograd.grad(loss(batch), batch.output, upstream)


class Check:
    """The check of a loss and its gradient against float64, on one batch."""

    def __init__(self, batch: Batch, mode: str, terms: Terms) -> None:
        self.batch, self.mode = batch, mode
        exact = Batch(
            batch.output.detach().double().requires_grad_(), batch.target.double(), batch.norm, batch.norm
        )
        self.exact = self._results(_plain(terms), exact, LOSS_SCALE.get(batch.output.dtype, 1.0))
        self.plain = self._errors(_three_dot(terms))

    def __call__(self, loss: Loss, rival: bool = False) -> float:
        """Return the largest relative error; raise AssertionError where it exceeds its limit."""
        errors = self._errors(loss)
        factor, slack = 20.0 if rival else 2.0, 1e-6  # a sum may be exact by chance
        if rival and self.batch.output.element_size() == 2:
            slack = 0.02  # sums in 16 bits
        return assert_within(errors, [factor * plain_error + slack for plain_error in self.plain])

    def _errors(self, loss: Loss) -> list[float]:
        scale = LOSS_SCALE.get(self.batch.output.dtype, 1.0)
        results = self._results(loss, self.batch, scale)
        return [relative_error(got, exact) for got, exact in zip(results, self.exact, strict=True)]

    def _results(self, loss: Loss, batch: Batch, scale: float) -> list[Tensor]:
        value = loss(batch)
        if self.mode == FORWARD:
            return [value.detach()]
        return [value.detach(), *torch.autograd.grad(value, batch.output, torch.full_like(value, scale))]

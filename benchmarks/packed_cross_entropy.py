"""The cross-entropy of a head over a packed table beside dense logits: time and extra memory.

The table has the shape of SmolLM2-135M's and random rows with a falling spectrum, packed by `allocate`;
factors of the same size stand beside it (`low-rank`: the dense table on its leading singular vectors). Mode
`forward` is the loss without gradients, `hidden` the loss and the gradient of the hidden states from a frozen
table, `table` that of the table as well: of all rows where it is dense, of scales, basis and offset where it
is packed, of codes and basis where it is low-rank. Providers are timed in paired rounds with other states in
every round, embkern only after loss and gradient of the hidden states were compared with float64. Extra
memory is how far the resident set rises during one call (on CUDA: the allocator's peak).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embkern.experiments.timing import paired_ratio, sampler, side_stream
from embkern.methods import allocate
from embkern.nn import FactorizedEmbedding
from embkern.nn.packed import PackedEmbedding
from embkern.tables import Factors
from embkern.tables.packed import PackedTable

from .packed_head import SMOLLM2, _table
from .runner import Bench, Prepared, assert_within, option_parser, parse, relative_error, table_line

TOKENS = [128, 1024]
MODES = ("forward", "hidden", "table")
PROVIDERS = ("dense-fp32", "dense-bf16", "embkern", "low-rank", "embkern-torch")
DEFAULT = ("dense-fp32", "embkern", "low-rank")
INPUTS = 2

Loss = Callable[[Tensor, Tensor], Tensor]


def main(arguments: list[str]) -> None:
    """Measure every cell, print a line each; exit 1 if a provider failed."""
    parser = option_parser("packed_cross_entropy", __doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[16.0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="N, the numbers of states")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--softcap", type=float, help="of the logits, as in Gemma 2")
    options = parse(parser, arguments, PROVIDERS, seconds={"cpu": (8.0, 1.0), "cuda": (1.0, 0.3)})
    bench = PackedCrossEntropyBench("packed_cross_entropy", arguments, options)
    with side_stream(options.device):
        dense, _ = _table("smollm2")
        for ratio in options.ratios:
            bench.run(dense, ratio)
    bench.finish()


def _factors(dense: Tensor, nbytes: int) -> Factors:
    """Return the best factors in fp16 that take as many bytes."""
    V, H = dense.shape
    rank = max(1, nbytes // 2 // (V + H))
    vectors = torch.linalg.eigh(dense.double().t() @ dense.double()).eigenvectors[:, -rank:].float()
    return Factors(dense @ vectors, vectors.t().contiguous())


class PackedCrossEntropyBench(Bench):
    """Runs cells and keeps their rows."""

    def run(self, dense: Tensor, ratio: float) -> None:
        """Measure all numbers of tokens in all modes; write the results file after each mode."""
        table = allocate(dense, ratio=ratio)
        factors = _factors(dense, table.nbytes)
        print(f"\n{SMOLLM2} at {ratio:g}x: {table.nbytes:,} bytes; factors of rank {factors.rank}")
        for mode in self.options.modes:
            names = self.available(self.options.providers or DEFAULT, lambda _: None)
            print(table_line(f"median us, {mode}", {each: each for each in names}, names))
            for count in self.before_deadline(self.options.tokens, f"numbers of tokens ({mode}, {ratio:g}x)"):
                self._run_cell(table, factors, dense, ratio, mode, count, names)
            self.write()

    def _losses(
        self, table: PackedTable, factors: Factors, dense: Tensor, trained: bool
    ) -> dict[str, tuple[Loss, list[Tensor]]]:
        """Return the loss of every provider, and its parameters that are trained."""
        device, cap = self.options.device, self.options.softcap

        def dense_loss(weight: Tensor) -> tuple[Loss, list[Tensor]]:
            weight = weight.to(device).requires_grad_(trained)

            def loss(hidden: Tensor, labels: Tensor) -> Tensor:
                logits = F.linear(hidden.to(weight.dtype), weight)
                logits = logits if cap is None else cap * torch.tanh(logits / cap)
                return F.cross_entropy(logits, labels)

            return loss, [weight] if trained else []

        def head_loss(embedding: Any) -> tuple[Loss, list[Tensor]]:
            head = embedding.to(device).requires_grad_(trained).head()
            return functools.partial(head.loss, softcap=cap), list(head.parameters()) if trained else []

        wide = table.to(device, torch.float32)
        return {
            "dense-fp32": dense_loss(dense.clone()),
            "dense-bf16": dense_loss(dense.bfloat16()),
            "embkern": head_loss(PackedEmbedding.from_table(wide)),
            "embkern-torch": head_loss(PackedEmbedding.from_table(wide, backend="torch")),
            "low-rank": head_loss(FactorizedEmbedding.from_table(factors)),
        }

    def _run_cell(
        self,
        table: PackedTable,
        factors: Factors,
        dense: Tensor,
        ratio: float,
        mode: str,
        count: int,
        names: list[str],
    ) -> None:
        (V, H), device, cap = dense.shape, self.options.device, self.options.softcap
        generator = torch.Generator().manual_seed(count)
        hidden = [torch.randn(count, H, generator=generator).to(device) for _ in range(INPUTS)]
        labels = torch.randint(V, (count,), generator=generator).to(device)
        losses = self._losses(table, factors, dense, mode == "table")

        def run(name: str, states: Tensor) -> list[Tensor]:
            loss, trained = losses[name]
            if mode == "forward":
                with torch.no_grad():
                    return [loss(states, labels)]
            leaf = states.detach().requires_grad_()
            value = loss(leaf, labels)
            return [value.detach(), *torch.autograd.grad(value, [leaf, *trained])]

        def exact(rows: Tensor) -> list[Tensor]:
            few = slice(0, 64)  # states, whose logits in float64 take 25 MB
            leaf = hidden[0][few].cpu().double().requires_grad_()
            logits = leaf @ rows.t()
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            value = F.cross_entropy(logits, labels[few].cpu())
            return [value.detach(), *torch.autograd.grad(value, leaf)]

        def prepare(name: str) -> Prepared:
            error = None
            if not name.startswith("dense"):
                rows = (factors if name == "low-rank" else table).to(dtype=torch.float64).to_dense()
                loss, _ = losses[name]
                leaf = hidden[0][:64].detach().requires_grad_()
                value = loss(leaf, labels[:64])
                got = [value.detach().cpu(), torch.autograd.grad(value, leaf)[0].cpu()]
                errors = [relative_error(*each) for each in zip(got, exact(rows), strict=True)]
                error = assert_within(errors, [1e-5, 1e-4], ["loss", "gradient of hidden"])
            sample, timer = sampler(device, [functools.partial(run, name, each) for each in hidden])
            return Prepared(sample, {"error": error, "timer": timer}, functools.partial(run, name, hidden[0]))

        measured = self.measure(f"{mode} {count}", names, prepare)
        for name in measured.times:
            others = [each for each in measured.times if each != name]
            self.rows.append(
                {
                    "op": "packed_cross_entropy",
                    "mode": mode,
                    "N": count,
                    "provider": name,
                    "asked": ratio,
                    "bytes": table.nbytes,
                    "rank": factors.rank if name == "low-rank" else None,
                    "softcap": cap,
                    "V": V,
                    "H": H,
                    "device": device,
                    **measured.figures(name),
                    "extra_memory": measured.peaks[name],
                    "times_as_fast_as": {each: paired_ratio(measured.times, each, name) for each in others},
                }
            )
        memory = ", ".join(
            f"{name} {peak / 1e6:.1f} MB" for name, peak in measured.peaks.items() if peak is not None
        )
        speed = ", ".join(
            f"{name} {paired_ratio(measured.times, 'dense-fp32', name):.2f}x"
            for name in measured.times
            if name != "dense-fp32" and "dense-fp32" in measured.times
        )
        print(measured.line(f"N = {count}", names), speed, memory, sep="   ", flush=True)

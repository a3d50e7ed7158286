"""A masked language model's own samples as a calibration, beside none and one on text: perplexity and KL.

Samples begin as masks alone. In each round some tokens are masked anew, fewer in every round, and drawn from
what the model predicts at them, at temperature 1: a few sweeps of Gibbs sampling by blocks. Each table is
`allocate`'s. What it knows is a calibration (none, on own samples after some rounds, on text) and the
frequencies of tokens: counts of text, those that the calibration estimates, or the vocabulary's order.

The model is the masked one of `python -m benchmarks reference_models`, with its text: counted and calibrated
on the train part, scored on the test part. `--model`, `--text` and `--scored` replace them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from embkern.evaluate.perplexity import evaluate_perplexity
from embkern.io.cache import cache_directory
from embkern.methods import METHODS, Calibration
from embkern.models.calibrate import calibrate
from embkern.models.calibrate.objectives import LanguageModel, mask_of
from embkern.models.calibrate.on_text import facts_of, run_of
from embkern.models.calibrate.passes import run_pass
from embkern.models.calibrate.sampling import resample_windows
from embkern.models.find_table import find_table
from embkern.models.inference import longest_input
from embkern.models.loading import load_model, load_tokenizer
from embkern.text.counts import count_tokens
from embkern.text.frequencies import COMPRESSION_STRENGTH, expected_frequencies
from embkern.text.prior import vocabulary_prior
from embkern.text.reading import read_texts

from .results_file import RESULTS, command_line, write_results
from .runner import option_parser, table_line

ROUNDS = (1, 8, 32)
RATIOS = (16.0, 32.0)
SAMPLES, LENGTH = 128, 128
COUNTED_CHARACTERS = 6_000_000
SCORED_TOKENS = 16_384
COLUMNS = {
    "ppl in": ("input_only", "perplexity", ".2f"),
    "KL in": ("input_only", "kl", ".4f"),
    "ppl tied": ("tied", "perplexity", ".2f"),
    "KL tied": ("tied", "kl", ".4f"),
}


def main(arguments: list[str]) -> None:
    """Measure every table; print a line each, and write them."""
    options = _parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    model, tokenizer = load_model(options.model).eval(), load_tokenizer(options.model)
    assert tokenizer is not None, f"no tokenizer in {options.model}"
    table = find_table(model).weight.detach()
    texts = _first(list(read_texts(options.text)), COUNTED_CHARACTERS)
    scored = list(read_texts(options.scored))
    prior = vocabulary_prior(tokenizer, len(table))
    counted = count_tokens(texts, tokenizer, num_embeddings=len(table), progress=False)
    counts = expected_frequencies(counted, prior, strength=COMPRESSION_STRENGTH)
    known: dict[str, dict[str, Any]] = {"nothing": {"counts": prior}}
    samples = {
        f"own samples, {rounds} rounds": sampled_calibration(model, tokenizer, rounds, options.seed)
        for rounds in options.rounds
    }
    known |= {name: {"calibration": each} for name, each in samples.items()}
    known["counts"] = {"counts": counts}
    known |= {f"counts, {name}": {"calibration": each, "counts": counts} for name, each in samples.items()}
    on_text = calibrate(
        model, tokenizer, texts, tokens=SAMPLES * LENGTH, length=LENGTH, seed=options.seed, progress=False
    )
    known["counts, text"] = {"calibration": on_text, "counts": counts}
    tables = {
        f"{name}, {ratio:g}x": METHODS["allocate"].compress(table, ratio=ratio, **each)
        for ratio in options.ratios
        for name, each in known.items()
    }
    report = evaluate_perplexity(model, tokenizer, scored, tables, max_tokens=options.tokens, progress=False)
    assert report.model is not None, "own is True"
    rows = []
    print(table_line("what is known", {name: name for name in COLUMNS}, COLUMNS, width=44))
    for each in report.tables:
        row: dict[str, Any] = {"known": each.name, "bytes": tables[each.name].nbytes}
        for name in ("input_only", "tied"):
            figures = getattr(each, name)
            if figures is not None:
                kl = round(figures.divergence.mean, 6)
                row[name] = {"perplexity": round(figures.perplexity, 4), "kl": kl}
        rows.append(row)
        shown = {
            title: format(row[place][key], form)
            for title, (place, key, form) in COLUMNS.items()
            if place in row
        }
        print(table_line(each.name, shown, COLUMNS, width=44))
    print(f"dense: perplexity {report.model.perplexity:.2f}")
    path = write_results(
        "masked_samples",
        command_line("masked_samples", arguments),
        rows,
        directory=options.results,
        dense=round(report.model.perplexity, 4),
        tokens=report.model.tokens,
    )
    print("->", path)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser, reference = option_parser("masked_samples", __doc__), cache_directory() / "reference"
    add = parser.add_argument
    add("--model", type=Path, default=reference / "bert", help="a masked language model")
    add("--text", type=Path, default=reference / "text" / "train.txt", help="to count and calibrate on")
    add("--scored", type=Path, default=reference / "text" / "test.txt")
    add("--rounds", type=int, nargs="+", default=list(ROUNDS))
    add("--ratios", type=float, nargs="+", default=list(RATIOS))
    add("--tokens", type=int, default=SCORED_TOKENS, help="of the scored text")
    add("--seed", type=int, default=0)
    add("--results", type=Path, default=RESULTS, help="directory of the JSON file")
    return parser.parse_args(arguments)


def _first(texts: Sequence[str], characters: int) -> list[str]:
    """Return every n-th text, so that they have at most some ``characters``."""
    return list(texts[:: max(1, -(-sum(map(len, texts)) // characters))])


def sampled_calibration(model: Any, tokenizer: Any, rounds: int, seed: int) -> Calibration:
    """Return the calibration of a masked model on samples that it resampled for some rounds."""
    length, device = min(LENGTH, longest_input(model)), torch.device("cpu")
    windows = resample_windows(
        model, tokenizer, SAMPLES, length, seed, device=device, rounds=rounds, progress=False
    )
    facts = facts_of(model, "masked", None, run_of("samples", windows, seed))
    objective = LanguageModel(model, windows, seed, mask_of(tokenizer))
    return run_pass(model, find_table(model), windows, objective, facts, progress=False)

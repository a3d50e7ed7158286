"""Two small language models with tied heads, trained from scratch on text of this installation.

    python -m benchmarks reference_models [--models bert gpt] [--minutes 8]

`bert` is a masked model with a WordPiece tokenizer, `gpt` a causal one with byte-level BPE. They land in
`cache_directory()/reference/{bert,gpt}` as transformers directories, each with its facts in `reference.json`,
beside the text they share: `text/{train,valid,test}.txt`, a paragraph a line, no document in two of them.

A run is bounded by steps: the same text, seed, steps, threads and machine give the same weights, and
`--minutes` only sets the number of steps, by what two cores did. An interrupted run continues from its last
checkpoint. On a GPU the batch is eight times as large.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from embkern.io.cache import cache_directory

from ...results_file import command_line
from .corpus import write_text
from .kinds import KINDS, MINUTES, Recipe
from .training import damaged, train


def main(arguments: list[str]) -> None:
    """Train the models that are not in the cache."""
    options = _parse(arguments)
    root = (options.cache or cache_directory()) / "reference"
    wanted = [name for name in options.models if options.overwrite or not (root / name).exists()]
    for name in options.models:
        if name not in wanted:
            print(f"{name}: is in {root / name} already (--overwrite trains it again)")
            if reason := damaged(root / name):
                raise ValueError(f"{root / name} is damaged: {reason}; --overwrite trains it again")
    if wanted and not (root / "text").exists():
        print("collecting text of this installation: a minute or two", flush=True)
        write_text(root / "text")
    command = command_line("reference_models", arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in wanted:
        steps = options.steps or max(1, round(KINDS[name].steps * options.minutes / MINUTES))
        recipe = Recipe(steps, batch=128 if device == "cuda" else 16, seed=options.seed)
        minutes = steps / KINDS[name].steps * MINUTES
        print(f"{name}: {steps} steps, about {minutes:.1f} minutes on two cores", flush=True)
        facts = train(name, root, recipe, device=device, command=command)
        perplexity = f"{facts['valid_perplexity']} (unigram {facts['unigram_perplexity']})"
        size = f"{facts['parameters']:,} parameters"
        print(
            f"{name}: validation perplexity {perplexity}, {size}, {facts['seconds']:.0f} s -> {root / name}"
        )


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks reference_models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=list(KINDS), default=list(KINDS))
    add("--minutes", type=float, default=MINUTES, help="about, per model on two cores: sets the steps")
    add("--steps", type=int, help="per model, instead of --minutes")
    add("--seed", type=int, default=0)
    add("--cache", type=Path, help="directory; default: embkern's cache")
    add("--overwrite", action="store_true", help="train again, on the same text unless that is removed")
    return parser.parse_args(arguments)

"""Two small language models with tied heads, trained from scratch on text of this installation.

    python -m benchmarks reference_models [--models bert gpt] [--minutes 8] [--ngrammer [concat|add]]

`bert` is a masked model with a WordPiece tokenizer, `gpt` a causal one with byte-level BPE. They land in
`cache_directory()/reference/{bert,gpt}` as transformers directories, each with its facts in `reference.json`,
beside the text they share: `text/{train,valid,test}.txt`, a paragraph a line, no document in two of them.

A run is bounded by steps: the same text, seed, steps, threads and machine give the same weights, and
`--minutes` only sets the number of steps, by what two cores did. An interrupted run continues from its last
checkpoint. On a GPU the batch is eight times as large.

With `--ngrammer` the causal model has an N-Grammer at its embedding, and lands in `gpt-ngrammer-concat` or
`gpt-ngrammer-add`. The same steps without it read the same tokens: the two perplexities can be compared.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from embkern.io.cache import cache_directory

from ...results_file import command_line
from .corpus import TRAIN_CHARS, write_text
from .kinds import KINDS, MINUTES, Recipe
from .training import damaged, directory_of, train


def main(arguments: list[str]) -> None:
    """Train the models that are not in the cache."""
    options = _parse(arguments)
    root = (options.cache or cache_directory()) / "reference"
    places = {name: root / directory_of(name, options.ngrammer) for name in options.models}
    wanted = [name for name in options.models if options.overwrite or not places[name].exists()]
    for name in options.models:
        if name not in wanted:
            print(f"{name}: is in {places[name]} already (--overwrite trains it again)")
            if reason := damaged(places[name]):
                raise ValueError(f"{places[name]} is damaged: {reason}; --overwrite trains it again")
    if wanted and not (root / "text").exists():
        print("collecting text of this installation: a minute or two", flush=True)
        write_text(root / "text", train_chars=options.characters)
    command = command_line("reference_models", arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in wanted:
        steps = options.steps or max(1, round(KINDS[name].steps * options.minutes / MINUTES))
        recipe = Recipe(steps, batch=128 if device == "cuda" else 16, seed=options.seed)
        if options.ngrammer is not None:
            recipe = dataclasses.replace(recipe, ngrammer=options.ngrammer)
        minutes = steps / KINDS[name].steps * MINUTES
        print(f"{name}: {steps} steps, about {minutes:.1f} minutes on two cores", flush=True)
        facts = train(name, root, recipe, device=device, command=command)
        perplexity = f"{facts['valid_perplexity']} (unigram {facts['unigram_perplexity']})"
        size = f"{facts['parameters']:,} parameters"
        took = f"{facts['seconds']:.0f} s"
        print(f"{name}: validation perplexity {perplexity}, {size}, {took} -> {places[name]}")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks reference_models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=list(KINDS), help="default: all; with --ngrammer, gpt")
    add("--minutes", type=float, default=MINUTES, help="about, per model on two cores: sets the steps")
    add("--steps", type=int, help="per model, instead of --minutes")
    add(
        "--characters", type=int, default=TRAIN_CHARS, help="of the text to learn from, where it is collected"
    )
    add("--seed", type=int, default=0)
    add("--cache", type=Path, help="directory; default: embkern's cache")
    add("--overwrite", action="store_true", help="train again, on the same text unless that is removed")
    add(
        "--ngrammer",
        nargs="?",
        const="concat",
        choices=["concat", "add"],
        help="with an N-Grammer at the embedding of gpt, in the form of the paper or one that adds to rows",
    )
    options = parser.parse_args(arguments)
    options.models = options.models or (["gpt"] if options.ngrammer else list(KINDS))
    if options.ngrammer and options.models != ["gpt"]:
        parser.error(f"--ngrammer: expected --models gpt, got {' '.join(options.models)}")
    return options

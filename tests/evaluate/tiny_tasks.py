"""Tiny tasks to fine-tune on, in the formats of GLUE and SQuAD."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file

from embkern.evaluate import GLUE, fine_tune

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["good", "bad", "what", "is", "the", "answer", *[f"w{i}" for i in range(94)]]
FAST = dict(max_length=16, batch_size=16, learning_rate=5e-3)  # in place of the paper's, for speed


def sentences(count: int, seed: int) -> list[dict]:
    """Return sentences of six words, one of which determines the label."""
    draw = random.Random(seed)
    records = []
    for i in range(count):
        words = draw.sample(WORDS[6:30], 5)
        words.insert(draw.randrange(6), WORDS[i % 2])
        records.append({"sentence": " ".join(words), "label": i % 2})
    return records


def questions(count: int, seed: int) -> list[dict]:
    """Return paragraphs of 150 words; the answer is the word after "answer"."""
    draw = random.Random(seed)
    records = []
    for i in range(count):
        words = draw.choices(WORDS[6:], k=150)
        place = draw.randrange(149)
        words[place] = "answer"
        start = len(" ".join(words[: place + 1])) + 1
        answers = {"text": [words[place + 1]], "answer_start": [start]}
        records.append(
            {"id": str(i), "context": " ".join(words), "question": "what is the answer", "answers": answers}
        )
    return records


def write(path: Any, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def study(bert: Any, source: Any, output: Any, *tasks: Any, **options: Any) -> Any:
    settings = {"methods": ("dense",), "ratio": 2.0, "data": source, **FAST, **options}
    return fine_tune(bert, tasks or [GLUE["sst2"]], output=output, **settings)


def saved(result: Any, output: Any) -> list[dict[str, torch.Tensor]]:
    """Return the tensors of every cell's saved model."""
    return [load_file(output / cell.settings.folder / "model" / "model.safetensors") for cell in result.cells]


class Oracle:
    """Stands in for a trainer: a function computes its predictions from the records."""

    def __init__(self, predict: Any) -> None:
        self.predict = lambda records: SimpleNamespace(**predict(records))

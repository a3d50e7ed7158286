"""Writes two small tasks in the formats of GLUE and SQuAD, made of docstrings, to fine-tune on offline.

`sst2` asks which of two packages a sentence comes from. In `squad` the question is a sentence with one word
blanked, the context holds that sentence and those around it, and the answer is the word. The tasks replace
GLUE and SQuAD without network access; their figures cannot be compared with published ones.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from embkern.io.atomic import replacing

from ..text import docstring_sentences

PACKAGES = ("numpy", "torch")
CONTEXT = 4  # sentences
BLANK = "____"
_WORD = re.compile(r"\b[a-z]{5,}\b")


def main(arguments: list[str]) -> None:
    """Write train and validation records of both tasks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks offline_tasks", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--records", type=int, default=6000, help="of each task, a sixth of them held out")
    options = parser.parse_args(arguments)
    makers: dict[str, Callable[[], list[dict[str, Any]]]] = {"sst2": sentences, "squad": clozes}
    for task, make in makers.items():
        records = make()
        random.Random(0).shuffle(records)
        records = records[: options.records]
        held_out = len(records) // 6
        for name, part in (("validation", records[:held_out]), ("train", records[held_out:])):
            path = options.output / task / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_text("".join(json.dumps(record) + "\n" for record in part), encoding="utf-8")
            print("->", path, len(part))


def sentences() -> list[dict[str, Any]]:
    """Sentences of two packages, as many of either, none of them in both."""
    found = [dict.fromkeys(each for text in _texts(name) for each in text) for name in PACKAGES]
    alone = [[each for each in own if each not in other] for own, other in (found, found[::-1])]
    for each in alone:
        random.Random(0).shuffle(each)
    fewest = min(map(len, alone))
    return [{"sentence": each, "label": label} for label in (0, 1) for each in alone[label][:fewest]]


def clozes() -> list[dict[str, Any]]:
    """Yield a blanked sentence and its context for each group of sentences of a docstring."""
    draw = random.Random(0)
    records: list[dict[str, Any]] = []
    for name in PACKAGES:
        for text in _texts(name):
            for first in range(0, len(text) - CONTEXT + 1, CONTEXT):
                stretch = text[first : first + CONTEXT]
                context, asked = " ".join(stretch), draw.choice(stretch)
                words = [word for word in _WORD.findall(asked) if context.count(word) == 1]
                if words:
                    answer = draw.choice(words)
                    records.append(
                        {
                            "id": f"{name}-{len(records)}",
                            "context": context,
                            "question": asked.replace(answer, BLANK),
                            "answers": {"text": [answer], "answer_start": [context.index(answer)]},
                        }
                    )
    return records


def _texts(package: str) -> Iterator[list[str]]:
    """The sentences of every docstring of an installed package."""
    return docstring_sentences(Path(sysconfig.get_paths()["purelib"]) / package)

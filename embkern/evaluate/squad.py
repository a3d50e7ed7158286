"""SQuAD 1.1 (arXiv 1606.05250): find the answer to a question in a paragraph.

A paragraph that is longer than the model's input is read in windows that overlap by ``stride`` tokens. An
answer's score is the sum of the logits of its first and its last token; the best one over all windows counts.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..io.optional import require
from .records import check_records, find_file, read_file, read_hub
from .tasks import Prepared, Task, Training, load_with_head

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

HUB_NAME = "rajpurkar/squad"
MAX_QUESTION_TOKENS = 64  # as in BERT's own code
MAX_ANSWER_TOKENS = 30
N_BEST = 20  # candidates for the first and for the last token of an answer in a window

_OFFICIAL_FILES = {"train": "train-v1.1", "validation": "dev-v1.1"}


# ---- the metric ------------------------------------------------------------------------------------------


def normalize_answer(text: str) -> str:
    """Return a text in lower case, without ASCII punctuation and articles, with single spaces."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, truth: str) -> float:
    """Return 1 if both are equal after ``normalize_answer``, else 0."""
    return float(normalize_answer(answer) == normalize_answer(truth))


def f1(answer: str, truth: str) -> float:
    """Return the harmonic mean of precision and recall of the words that ``normalize_answer`` leaves.

    It is 0 if no word is left in either text, as in the official script of version 1.1.
    """
    words, wanted = normalize_answer(answer).split(), normalize_answer(truth).split()
    common = (Counter(words) & Counter(wanted)).total()
    return 2 * common / (len(words) + len(wanted)) if common else 0.0


def squad_scores(answers: list[str], truths: list[list[str]]) -> dict[str, float]:
    """Return exact match and F1, times 100: means over questions of the best over a question's truths."""

    def mean(metric: Callable[[str, str], float]) -> float:
        best = [max(metric(a, each) for each in known) for a, known in zip(answers, truths, strict=True)]
        return 100 * float(np.mean(best))

    return {"exact_match": mean(exact_match), "f1": mean(f1)}


# ---- windows ---------------------------------------------------------------------------------------------


def windows_of(
    batch: dict[str, list], indices: list[int], tokenizer: PreTrainedTokenizerBase, training: Training
) -> dict[str, list]:
    """Tokenise questions with their paragraphs; a long paragraph gives several windows.

    Returns:
        The tokenizer's output, and for each window ``record``, the index of its record, and ``spans``, the
        characters of each token in the paragraph: [first, last + 1], or [-1, -1] outside the paragraph.
    """
    questions = [_shortened(question.strip(), tokenizer) for question in batch["question"]]
    windows = tokenizer(
        questions,
        batch["context"],
        truncation="only_second",  # the paragraph
        max_length=training.max_length,
        stride=training.stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    spans = [
        [
            list(span) if part == 1 else [-1, -1]
            for span, part in zip(offsets, windows.sequence_ids(i), strict=True)
        ]
        for i, offsets in enumerate(windows.pop("offset_mapping"))
    ]
    records = [indices[each] for each in windows.pop("overflow_to_sample_mapping")]
    return {**windows, "record": records, "spans": spans}


def _shortened(question: str, tokenizer: PreTrainedTokenizerBase) -> str:
    tokens = tokenizer(
        question,
        truncation=True,
        max_length=MAX_QUESTION_TOKENS,
        add_special_tokens=False,
        return_offsets_mapping=True,
    )
    return question[: tokens["offset_mapping"][-1][1]] if tokens["offset_mapping"] else question


def mark_answer(spans: list[list[int]], start: int, end: int) -> tuple[int, int] | None:
    """Return the first and last token of characters ``start`` to ``end``, None if any is missing."""
    inside = [i for i, (first, _) in enumerate(spans) if first >= 0]
    if not inside or spans[inside[0]][0] > start or spans[inside[-1]][1] < end:
        return None
    first = next(i for i in inside if spans[i][1] > start)
    last = next(i for i in reversed(inside) if spans[i][0] < end)
    return first, last


def best_answer(
    start_logits: np.ndarray, end_logits: np.ndarray, spans: np.ndarray
) -> tuple[float, int, int] | None:
    """Return the best answer of a window: its score, and its characters in the paragraph.

    The ``N_BEST`` best first tokens are paired with the ``N_BEST`` best last tokens. Of the pairs that are in
    order and not longer than ``MAX_ANSWER_TOKENS``, the one with the largest sum of logits is returned.

    Args:
        start_logits: (L,) logits of the first token, padding included.
        end_logits: (L,) logits of the last token, padding included.
        spans: (L or fewer, 2), as ``windows_of`` returns them.
    """
    inside = np.flatnonzero(spans[:, 0] >= 0)
    first = inside[np.argsort(-start_logits[inside], kind="stable")[:N_BEST]]
    last = inside[np.argsort(-end_logits[inside], kind="stable")[:N_BEST]]
    length = last[None, :] - first[:, None] + 1
    score = start_logits[first][:, None] + end_logits[last][None, :]
    score = np.where((length >= 1) & (length <= MAX_ANSWER_TOKENS), score, -np.inf)
    if not np.isfinite(score).any():
        return None
    i, j = np.unravel_index(score.argmax(), score.shape)
    return float(score[i, j]), int(spans[first[i], 0]), int(spans[last[j], 1])


# ---- the task --------------------------------------------------------------------------------------------


class SquadTask(Task):
    """SQuAD 1.1, scored on its development set."""

    name = "squad"
    metrics = ("exact_match", "f1")
    training = Training(learning_rate=3e-5, batch_size=16, max_length=384, stride=128)
    splits = ("train", "validation")
    text_columns = ("question", "context")

    def load_model(self, name: str) -> PreTrainedModel:
        """Return the model with a new head that predicts spans."""
        return load_with_head("AutoModelForQuestionAnswering", name)

    def files(self, data: Path) -> list[Path]:
        """Return the files of local data, which may be SQuAD's own JSON."""
        return [_find(data, split) for split in self.splits]

    def read_split(self, split: str, data: Path | None) -> Dataset:
        """Return the records of a split: question, context, answers with text and answer_start."""
        if data is None:
            return read_hub(HUB_NAME, None, split)
        path = _find(data, split)
        return read_official(path) if path.suffix == ".json" else read_file(path)

    def prepare(
        self, splits: list[Dataset], tokenizer: PreTrainedTokenizerBase, training: Training
    ) -> Prepared:
        """Cut paragraphs into windows; the target of a window is the first answer, or [CLS] without one."""
        for split, records in zip(self.splits, splits, strict=True):
            check_records(records, self.text_columns, ("answers",), f"squad, {split}")
        if not tokenizer.is_fast:
            raise ValueError("tokenizer: expected a fast one, which knows the characters of each token")
        if tokenizer.padding_side != "right":  # positions of answers count from the first token
            raise ValueError(
                f"tokenizer: expected one that pads on the right, got padding_side {tokenizer.padding_side}"
            )
        room = training.max_length - MAX_QUESTION_TOKENS - tokenizer.num_special_tokens_to_add(pair=True)
        if training.stride >= room:
            raise ValueError(
                f"stride: expected less than {room} tokens (max_length without a question of "
                f"{MAX_QUESTION_TOKENS} and special tokens), got {training.stride}"
            )
        train, evaluated = splits
        cut = partial(windows_of, tokenizer=tokenizer, training=training)

        def encode(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
            windows = cut(batch, indices)
            answers = dict(zip(indices, batch["answers"], strict=True))
            marks = []
            for record, spans in zip(windows.pop("record"), windows.pop("spans"), strict=True):
                texts, starts = answers_of(answers[record], f"squad, train, record {record}")
                marks.append(mark_answer(spans, starts[0], starts[0] + len(texts[0])) or (0, 0))
            first, last = zip(*marks, strict=True)
            return {**windows, "start_positions": list(first), "end_positions": list(last)}

        options: dict[str, Any] = {"batched": True, "with_indices": True}
        windows = evaluated.map(cut, remove_columns=evaluated.column_names, **options)
        truths = [
            answers_of(each, f"squad, validation, record {i}")[0]
            for i, each in enumerate(evaluated["answers"])
        ]
        return Prepared(
            train.map(encode, remove_columns=train.column_names, **options),
            partial(self._score, list(evaluated["context"]), truths, windows),
            len(train),
            len(evaluated),
        )

    def _score(
        self, contexts: list[str], truths: list[list[str]], windows: Dataset, trainer: Trainer
    ) -> dict[str, float]:
        found: Any = trainer.predict(windows.remove_columns(["record", "spans"]))
        start_logits, end_logits = found.predictions[:2]
        if not (np.isfinite(start_logits).all() and np.isfinite(end_logits).all()):
            raise ValueError("squad: the model's predictions are not finite; training diverged")
        best: dict[int, tuple[float, int, int]] = {}
        for i, window in enumerate(windows):
            answer = best_answer(start_logits[i], end_logits[i], np.asarray(window["spans"]))
            if answer is not None:
                best[window["record"]] = max(answer, best.get(window["record"], answer))
        spans = {record: slice(first, last) for record, (_, first, last) in best.items()}
        answers = [context[spans[i]] if i in spans else "" for i, context in enumerate(contexts)]
        return squad_scores(answers, truths)


def answers_of(answers: Any, place: str) -> tuple[list[str], list[int]]:
    """Return texts and first characters of a record's answers, which are JSON in a CSV file.

    Raises:
        ValueError: there is no answer (SQuAD 1.1 has one to every question), or one without text or place.
    """
    try:
        answers = json.loads(answers) if isinstance(answers, str) else answers
        if isinstance(answers, list):  # a list of records; the hub has a record of lists
            answers = {key: [each[key] for each in answers] for key in ("text", "answer_start")}
        texts, starts = list(answers["text"]), [int(each) for each in answers["answer_start"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"data: {place}: expected answers with text and answer_start, got {answers!r}"
        ) from error
    if not texts or "" in texts or len(texts) != len(starts):
        raise ValueError(f"data: {place}: expected at least one answer and its place, got {answers!r}")
    return texts, starts


def _find(data: Path, split: str) -> Path:
    official = data / f"{_OFFICIAL_FILES[split]}.json"
    return official if official.is_file() else find_file(data, split, (".jsonl", ".csv", ".parquet", ".json"))


def read_official(path: Path) -> Dataset:
    """Return the records of a JSON file in the format in which SQuAD is published.

    Raises:
        ValueError: it has another format, or no records.
    """
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        records = [
            {
                "question": each["question"],
                "context": paragraph["context"],
                "answers": json.dumps(each["answers"]),
            }
            for article in articles
            for paragraph in article["paragraphs"]
            for each in paragraph["qas"]
        ]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"data: {path} is not JSON of SQuAD's form: {error!r}") from error
    if not records:
        raise ValueError(f"data: expected records, found none in {path}")
    return require("datasets").Dataset.from_list(records)


SQUAD = SquadTask()

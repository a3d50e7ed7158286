"""The nine tasks of GLUE (arXiv 1804.07461): classification or rating of sentences and of pairs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .records import check_records, find_file, read_file, read_hub
from .tasks import Prepared, Task, Training, load_with_head

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

HUB_NAME = "nyu-mll/glue"

Metric = Callable[[np.ndarray, np.ndarray], dict[str, float]]  # of labels and predictions


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Return the share of correct classes."""
    from sklearn.metrics import accuracy_score

    return {"accuracy": accuracy_score(labels, predictions)}


def accuracy_and_f1(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Return the share of correct classes, and the F1 score of class 1."""
    from sklearn.metrics import f1_score

    return {**accuracy(labels, predictions), "f1": f1_score(labels, predictions, zero_division=0)}


def matthews(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Return Matthews' correlation coefficient, 0 if labels or predictions are constant."""
    from sklearn.metrics import matthews_corrcoef

    return {"matthews": matthews_corrcoef(labels, predictions)}


def correlations(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation, 0 (as for Matthews') if an argument is constant."""
    from scipy.stats import pearsonr, spearmanr

    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": pearsonr(labels, predictions).statistic,
        "spearman": spearmanr(labels, predictions).statistic,
    }


class GlueTask(Task):
    """A task of GLUE: one or two columns of text and a label, a class or (if ``classes`` is 1) a rating.

    It is scored on the validation set, as the labels of the test set are not public.
    """

    training = Training(learning_rate=2e-5, batch_size=32, max_length=128)

    def __init__(
        self,
        name: str,
        text_columns: tuple[str, ...],
        metric: Metric,
        metrics: tuple[str, ...],
        *,
        classes: int = 2,
        evaluated: tuple[str, ...] = ("validation",),
    ) -> None:
        self.name, self.text_columns, self.metric, self.classes = name, text_columns, metric, classes
        self.splits = ("train", *evaluated)
        self._suffixes = [split.removeprefix("validation") for split in evaluated]
        self.metrics = tuple(each + suffix for suffix in self._suffixes for each in metrics)

    def load_model(self, name: str) -> PreTrainedModel:
        """Return the model with a new classifier or regressor."""
        return load_with_head("AutoModelForSequenceClassification", name, num_labels=self.classes)

    def read_split(self, split: str, data: Path | None) -> Dataset:
        """Return the records of a split, with the columns of the hub's data set."""
        return read_hub(HUB_NAME, self.name, split) if data is None else read_file(find_file(data, split))

    def prepare(
        self, splits: list[Dataset], tokenizer: PreTrainedTokenizerBase, training: Training
    ) -> Prepared:
        """Tokenise every text or pair of texts, truncated to ``max_length`` tokens."""
        for split, records in zip(self.splits, splits, strict=True):
            check_records(records, self.text_columns, ("label",), f"{self.name}, {split}")
            self._check_labels(records["label"][:], f"{self.name}, {split}")

        def encode(batch: dict[str, list]) -> dict[str, list]:
            texts = [batch[column] for column in self.text_columns]
            labels = batch["label"] if self.classes > 1 else [float(each) for each in batch["label"]]
            return {**tokenizer(*texts, truncation=True, max_length=training.max_length), "labels": labels}

        train, *evaluated = (
            records.map(encode, batched=True, remove_columns=records.column_names) for records in splits
        )
        return Prepared(train, partial(self._score, evaluated), len(train), sum(map(len, evaluated)))

    def _check_labels(self, labels: Any, place: str) -> None:
        values = np.unique(np.asarray(labels))
        wanted = f"whole numbers from 0 to {self.classes - 1}" if self.classes > 1 else "finite numbers"
        if values.dtype.kind not in ("iu" if self.classes > 1 else "iuf"):
            raise ValueError(f"data: {place}: expected {wanted} in column label, got {values[:3].tolist()}")
        right = np.isfinite(values) if self.classes == 1 else (values >= 0) & (values < self.classes)
        if not right.all():
            wrong = values[~right][:3].tolist()
            raise ValueError(f"data: {place}: expected {wanted} in column label, got {wrong} among them")

    def _score(self, evaluated: list[Dataset], trainer: Trainer) -> dict[str, float]:
        scores = {}
        for suffix, records in zip(self._suffixes, evaluated, strict=True):
            found: Any = trainer.predict(records)
            logits = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
            if not np.isfinite(logits).all():
                raise ValueError(f"{self.name}: the model's predictions are not finite; training diverged")
            predictions = logits.argmax(-1) if self.classes > 1 else logits.reshape(-1)
            for name, value in self.metric(found.label_ids, predictions).items():
                scores[name + suffix] = 100 * float(value)
        return scores


GLUE: dict[str, Task] = {
    task.name: task
    for task in (
        GlueTask("cola", ("sentence",), matthews, ("matthews",)),
        GlueTask("sst2", ("sentence",), accuracy, ("accuracy",)),
        GlueTask("mrpc", ("sentence1", "sentence2"), accuracy_and_f1, ("accuracy", "f1")),
        GlueTask("stsb", ("sentence1", "sentence2"), correlations, ("pearson", "spearman"), classes=1),
        GlueTask("qqp", ("question1", "question2"), accuracy_and_f1, ("accuracy", "f1")),
        GlueTask(
            "mnli", ("premise", "hypothesis"), accuracy, ("accuracy",),
            classes=3, evaluated=("validation_matched", "validation_mismatched"),
        ),
        GlueTask("qnli", ("question", "sentence"), accuracy, ("accuracy",)),
        GlueTask("rte", ("sentence1", "sentence2"), accuracy, ("accuracy",)),
        GlueTask("wnli", ("sentence1", "sentence2"), accuracy, ("accuracy",)),
    )
}  # fmt: skip

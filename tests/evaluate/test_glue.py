"""Metrics and tasks of GLUE."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

for _needed in ("transformers", "datasets", "accelerate", "sklearn", "scipy"):
    pytest.importorskip(_needed)
import datasets
import transformers as T

from embkern.evaluate import GLUE, glue
from tests.evaluate.tiny_tasks import Oracle

pytestmark = pytest.mark.usefixtures("fine_tuning")


def test_metrics_equal_values_computed_by_hand():
    labels, predictions = np.array([1, 1, 1, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0])
    assert glue.accuracy(labels, predictions)["accuracy"] == pytest.approx(4 / 6)
    assert glue.accuracy_and_f1(labels, predictions)["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert glue.matthews(labels, predictions)["matthews"] == pytest.approx((2 * 2 - 1 * 1) / 9)
    ratings = glue.correlations(np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0, 9.0]))
    assert ratings["spearman"] == pytest.approx(1)
    assert ratings["pearson"] == pytest.approx(8 / (2 * (98 / 3)) ** 0.5)
    constant = np.zeros(6)
    assert glue.matthews(labels, constant)["matthews"] == 0
    assert set(glue.correlations(labels, constant).values()) == {0.0}


@pytest.mark.parametrize("name", GLUE)
def test_correct_predictions_score_100_in_every_task(bert, name):
    task, tokenizer = GLUE[name], T.AutoTokenizer.from_pretrained(bert)
    labels = {1: [0.0, 1.5, 2.5, 5.0], 2: [0, 1, 0, 1], 3: [0, 1, 2, 0]}[task.classes]
    rows = [{**dict.fromkeys(task.text_columns, "good w1"), "label": label} for label in labels]
    splits = [datasets.Dataset.from_list(rows)] * len(task.splits)
    prepared = task.prepare(splits, tokenizer, task.training)

    def right(records: Any) -> dict[str, Any]:
        found = np.array(records["labels"])
        return {"label_ids": found, "predictions": np.eye(3)[found] if task.classes > 1 else found[:, None]}

    def constant(records: Any) -> dict[str, Any]:
        return {**right(records), "predictions": np.ones((4, task.classes))}

    scores = prepared.score(Oracle(right))
    assert tuple(scores) == task.metrics
    assert list(scores.values()) == pytest.approx([100] * len(scores))
    assert all(score < 60 for score in prepared.score(Oracle(constant)).values())
    with pytest.raises(ValueError, match="predictions are not finite"):
        prepared.score(Oracle(lambda records: {**right(records), "predictions": np.full((4, 3), np.nan)}))

"""SQuAD: its metric, windows and answers, and its own file format."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

for _needed in ("transformers", "datasets", "accelerate", "sklearn", "scipy"):
    pytest.importorskip(_needed)
import datasets
import transformers as T

from embkern.evaluate import SQUAD, squad
from tests.evaluate.tiny_tasks import WORDS, Oracle, questions, study

pytestmark = pytest.mark.usefixtures("fine_tuning")


@pytest.mark.parametrize(
    ("answer", "truth", "exact", "f1"),
    [
        ("The  Eiffel-Tower!", "eiffeltower", 1, 1),
        ("a dog and an owl", "Dog and owl.", 1, 1),
        ("Theatre", "theatre", 1, 1),  # only whole words are articles
        ("the red house", "red brick house", 0, 2 * 1 * (2 / 3) / (1 + 2 / 3)),
        ("red red", "red", 0, 2 * (1 / 2) * 1 / (1 / 2 + 1)),
        ("blue", "red", 0, 0),
        ("", "red", 0, 0),
        ("the", "a", 1, 0),  # no word is left
    ],
)
def test_exact_match_and_f1(answer, truth, exact, f1):
    assert squad.exact_match(answer, truth) == exact
    assert squad.f1(answer, truth) == pytest.approx(f1)


def test_the_best_of_several_truths_counts():
    scores = squad.squad_scores(["red house", "blue"], [["house", "the red house"], ["green"]])
    assert scores == {"exact_match": 50, "f1": 50}


# ---- windows and answers ---------------------------------------------------------------------------------


@pytest.fixture
def prepared(bert):
    """SQuAD with paragraphs of several windows."""
    splits = [datasets.Dataset.from_list(questions(6, seed)) for seed in (0, 1)]
    settings = SQUAD.training.model_copy(update={"max_length": 96, "stride": 8})
    return SimpleNamespace(
        **vars(SQUAD.prepare(splits, T.AutoTokenizer.from_pretrained(bert), settings)), splits=splits
    )


def test_windows_cover_a_paragraph_and_overlap(bert):
    tokenizer = T.AutoTokenizer.from_pretrained(bert)
    record = questions(1, seed=3)[0]
    batch = {"question": [record["question"], "good " * 99], "context": [record["context"]] * 2}
    settings = SQUAD.training.model_copy(update={"max_length": 96, "stride": 8})
    windows = squad.windows_of(batch, [7, 8], tokenizer, settings)
    assert set(windows["record"]) == {7, 8}
    for index in (7, 8):
        spans = [
            spans for spans, own in zip(windows["spans"], windows["record"], strict=True) if own == index
        ]
        words = [[record["context"][a:b] for a, b in each if a >= 0] for each in spans]
        assert all(len(each) <= 96 for each in spans)
        assert all(before[-8:] == after[:8] for before, after in itertools.pairwise(words))
        together = [*words[0], *(word for later in words[1:] for word in later[8:])]
        assert together == record["context"].split()
    question = sum(a < 0 for a, _ in windows["spans"][windows["record"].index(8)])
    assert question == squad.MAX_QUESTION_TOKENS + 3


def test_answers_are_marked_where_they_are(prepared):
    answers = [record["answers"] for record in prepared.splits[0]]
    assert len(prepared.train) > len(answers) == prepared.train_records
    vocabulary = dict(enumerate(WORDS, start=5))
    marked = [each for each in prepared.train if each["start_positions"]]
    found = {vocabulary[each["input_ids"][each["start_positions"]]] for each in marked}
    assert found == {each["text"][0] for each in answers}, "in one window at least"
    assert 0 in prepared.train["start_positions"], "the others are marked at [CLS]"


def test_best_answer_is_in_order_short_and_in_the_paragraph():
    spans = np.array([[-1, -1], [-1, -1], *[[3 * i, 3 * i + 2] for i in range(40)], [-1, -1]])
    start, end = np.full(50, -9.0), np.full(50, -9.0)  # seven positions of padding
    start[0] = end[0] = 99.0  # [CLS]
    start[5], end[9] = 4.0, 3.0
    assert squad.best_answer(start, end, spans) == (7.0, 9, 23)
    end[3] = 8.0  # before the start
    assert squad.best_answer(start, end, spans) == (7.0, 9, 23)
    end[5 + squad.MAX_ANSWER_TOKENS] = 8.0  # one token too long
    assert squad.best_answer(start, end, spans) == (7.0, 9, 23)
    end[4 + squad.MAX_ANSWER_TOKENS] = 8.0
    assert squad.best_answer(start, end, spans) == (12.0, 9, 3 * (2 + squad.MAX_ANSWER_TOKENS) + 2)
    assert squad.best_answer(start, end, np.full((3, 2), -1)) is None


def test_correct_logits_give_every_answer_and_the_best_window_wins(prepared):
    truths = [record["answers"] for record in prepared.splits[1]]
    windows = prepared.score.args[2]

    def predict(records: Any) -> dict[str, Any]:
        logits = np.zeros((2, len(records), 96))
        for i, (spans, record) in enumerate(zip(windows["spans"], windows["record"], strict=True)):
            start = truths[record]["answer_start"][0]
            mark = squad.mark_answer(spans, start, start + len(truths[record]["text"][0]))
            first, last = mark or (40, 41)
            logits[0, i, first] = logits[1, i, last] = 5.0 if mark else 4.0
        return {"predictions": (logits[0], logits[1])}

    assert prepared.score(Oracle(predict)) == {"exact_match": 100, "f1": 100}
    with pytest.raises(ValueError, match="predictions are not finite"):
        prepared.score(Oracle(lambda records: {"predictions": (np.full((99, 96), np.nan),) * 2}))


# ---- the task --------------------------------------------------------------------------------------------


def test_squad_is_trained_and_scored(bert, data, tmp_path):
    options = dict(max_length=96, stride=8, epochs=0.3, methods=("svd",))
    (exact, f1) = study(bert, data, tmp_path, SQUAD, **options).scores
    assert (exact.task, exact.metric, f1.metric) == ("squad", "exact_match", "f1")
    assert 0 <= exact.mean <= f1.mean < 100


@pytest.mark.parametrize(
    "text", ["[]", "{]", "[" * 100_000, '{"data": [{"paragraphs": [{"context": "a"}]}]}', '{"data": []}']
)
def test_json_in_another_format_is_refused(tmp_path, text):
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"train.json is not JSON of SQuAD's form|expected records, found none"
    ):
        SQUAD.read_split("train", tmp_path)


@pytest.mark.parametrize(
    ("stride", "side", "message"),
    [
        (29, "right", "stride: expected less than 29 tokens"),
        (8, "left", "tokenizer: expected one that pads on the right, got padding_side left"),
    ],
)
def test_settings_that_squad_cannot_use_are_refused(bert, stride, side, message):
    tokenizer = T.AutoTokenizer.from_pretrained(bert, padding_side=side)
    settings = SQUAD.training.model_copy(update={"max_length": 96, "stride": stride})
    with pytest.raises(ValueError, match=message):
        SQUAD.prepare([datasets.Dataset.from_list(questions(1, seed=0))] * 2, tokenizer, settings)

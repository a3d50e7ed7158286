"""Records of tasks: local files of all formats, unusable ones, and the hub."""

from __future__ import annotations

import json
from typing import Any

import pytest

for _needed in ("transformers", "datasets", "accelerate", "sklearn", "scipy"):
    pytest.importorskip(_needed)
import datasets

from embkern.evaluate import GLUE, SQUAD, squad
from tests.evaluate.tiny_tasks import questions, sentences, study, write

pytestmark = pytest.mark.usefixtures("fine_tuning")


def test_all_formats_hold_the_same_records(tmp_path):
    records, own = sentences(4, 0), questions(3, 0)
    table = datasets.Dataset.from_list([{**each, "sentence": "NA"} for each in records])
    table.to_csv(str(tmp_path / "csv" / "train.csv"))
    table.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    write(tmp_path / "jsonl" / "train.jsonl", list(table))
    for kind in ("csv", "parquet", "jsonl"):
        assert list(GLUE["sst2"].read_split("train", tmp_path / kind)) == list(table)

    as_text = [{**each, "answers": json.dumps(each["answers"])} for each in own]
    datasets.Dataset.from_list(as_text).to_csv(str(tmp_path / "csv" / "validation.csv"))
    write(tmp_path / "jsonl" / "validation.jsonl", own)
    published = []
    for each in own:
        answers = [
            dict(zip(each["answers"], pair, strict=True))
            for pair in zip(*each["answers"].values(), strict=True)
        ]
        asked = {"question": each["question"], "answers": answers}
        published.append({"context": each["context"], "qas": [asked]})
    for name in ("dev-v1.1.json", "train.json"):
        (tmp_path / name).write_text(json.dumps({"data": [{"paragraphs": published}]}))
    for split, folder in (
        ("validation", "csv"),
        ("validation", "jsonl"),
        ("validation", "."),
        ("train", "."),
    ):
        found = SQUAD.read_split(split, tmp_path / folder)
        assert found["context"][:] == [each["context"] for each in own]
        assert [squad.answers_of(each, "") for each in found["answers"]] == [
            tuple(each["answers"].values()) for each in own
        ]


GOOD = {"sentence": "good", "label": 1}
ASKED = {"question": "what", "context": "the answer", "answers": {"text": ["answer"], "answer_start": [4]}}


@pytest.mark.parametrize(
    ("task", "train", "message"),
    [
        (
            "sst2",
            None,
            r"data: expected train with one of the suffixes .jsonl, .csv, .parquet in .*, found none",
        ),
        ("sst2", "", "data: expected records, got an empty file: .*train.jsonl"),
        ("sst2", "{]", "data: .*train.jsonl cannot be read: "),
        (
            "sst2",
            [{"text": "good", "label": 1}],
            r"sst2, train: expected columns sentence, label, got .* \(no sentence\)",
        ),
        ("sst2", [{"sentence": 5, "label": 1}], "sst2, train: expected text in column sentence, got int64"),
        ("sst2", [GOOD, {"sentence": None, "label": 1}], "column sentence has no value in 1 records"),
        (
            "sst2",
            [GOOD, {"sentence": "bad", "label": -1}],
            r"whole numbers from 0 to 1 in column label, got \[-1\]",
        ),
        (
            "sst2",
            [{"sentence": "bad", "label": "no"}],
            "expected whole numbers from 0 to 1 in column label, got",
        ),
        (
            "sst2",
            [{"sentence": "bad", "label": 0.5}],
            "expected whole numbers from 0 to 1 in column label, got",
        ),
        (
            "squad",
            [{**ASKED, "answers": {"text": [], "answer_start": []}}],
            "record 0: expected at least one answer",
        ),
        (
            "squad",
            [{**ASKED, "answers": {"text": [""], "answer_start": [10]}}],
            "record 0: expected at least one answer",
        ),
        (
            "squad",
            [{**ASKED, "answers": "none"}],
            "record 0: expected answers with text and answer_start, got 'none'",
        ),
        ("squad", [{**ASKED, "context": ["a"]}], "squad, train: expected text in column context, got lists"),
    ],
)
def test_unusable_data_is_refused(bert, tmp_path, task, train, message):
    write(tmp_path / "validation.jsonl", [GOOD if task == "sst2" else ASKED])
    if isinstance(train, list):
        write(tmp_path / "train.jsonl", train)
    elif train is not None:
        (tmp_path / "train.jsonl").write_text(train)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        study(bert, tmp_path, tmp_path / "out", {**GLUE, "squad": SQUAD}[task], max_length=96, stride=8)
    assert not (tmp_path / "out").exists()


def test_a_hub_that_cannot_be_reached_is_reported(bert, tmp_path, monkeypatch):
    asked = []

    def unreachable(*args: Any, **kwargs: Any) -> None:
        asked.append((*args, *kwargs.values()))
        raise ConnectionError("offline mode is enabled\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        FileNotFoundError,
        match=r"nyu-mll/glue cannot be loaded from the hub \(offline mode is enabled\); data",
    ):
        study(bert, None, tmp_path, GLUE["mnli"])
    with pytest.raises(FileNotFoundError, match="rajpurkar/squad cannot be loaded from the hub"):
        study(bert, None, tmp_path, SQUAD)
    assert asked == [("nyu-mll/glue", "mnli", "train"), ("rajpurkar/squad", None, "train")]

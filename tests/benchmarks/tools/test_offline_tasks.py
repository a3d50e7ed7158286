"""The offline stand-ins for GLUE and SQuAD are in those formats, and can be answered."""

import json

from benchmarks.tools import offline_tasks


def test_tasks_are_in_the_formats_of_glue_and_squad(tmp_path, monkeypatch) -> None:
    prose = [f"The {word} of every array is {word}ly kept in its own memory." for word in
             ("value", "shape", "border", "dtype", "stride", "length", "header", "symbol")]  # fmt: skip

    def texts(package):
        yield [f"{package} knows this. {each}" for each in prose] + [
            "A sentence that both of them have in common."
        ]

    monkeypatch.setattr(offline_tasks, "_texts", texts)
    offline_tasks.main(["-o", str(tmp_path), "--records", "12"])
    read = {
        path.relative_to(tmp_path).as_posix(): [json.loads(line) for line in path.read_text().splitlines()]
        for path in tmp_path.rglob("*.jsonl")
    }
    assert {name: len(rows) for name, rows in read.items()} == {
        "sst2/train.jsonl": 10, "sst2/validation.jsonl": 2,
        "squad/train.jsonl": 4, "squad/validation.jsonl": 0,
    }  # fmt: skip
    for row in read["sst2/train.jsonl"] + read["sst2/validation.jsonl"]:
        assert row["sentence"].startswith(offline_tasks.PACKAGES[row["label"]]), "what both have is left out"
    for row in read["squad/train.jsonl"]:
        (answer,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        assert row["context"][start : start + len(answer)] == answer
        assert row["question"].replace(offline_tasks.BLANK, answer) in row["context"]

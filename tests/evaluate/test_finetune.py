"""Fine-tuning studies: learned scores, saved models, wrong arguments and the command line."""

from __future__ import annotations

import json

import pytest
import torch

for _needed in ("transformers", "datasets", "accelerate", "sklearn", "scipy"):
    pytest.importorskip(_needed)
import transformers as T

import embkern
from tests.evaluate.tiny_tasks import study

pytestmark = pytest.mark.usefixtures("fine_tuning")


def test_a_separable_task_is_learned_and_reported(learned, bert, data):
    result = learned.result
    assert [(score.method, score.mean, score.spread) for score in result.scores] == [
        ("dense", 100, None),
        ("allocate", 100, None),
    ]
    assert [cell.steps for cell in result.cells] == [48] * 2
    dense, packed = result.cells
    assert (dense.ratio, dense.train_records, dense.eval_records) == (1, 96, 16)
    assert packed.ratio == pytest.approx(dense.table_bytes / packed.table_bytes)
    assert packed.ratio >= 2
    assert not list(learned.output.rglob("checkpoint-*"))


def test_a_saved_model_loads_and_scores_the_same(learned, data):
    folder = learned.output / learned.result.cells[-1].settings.folder / "model"
    model = T.AutoModelForSequenceClassification.from_pretrained(folder)
    assert isinstance(model.get_input_embeddings(), embkern.PackedEmbedding)
    tokenizer = T.AutoTokenizer.from_pretrained(folder)
    records = [json.loads(line) for line in (data / "sst2" / "validation.jsonl").read_text().splitlines()]
    with torch.no_grad():
        logits = model(**tokenizer([each["sentence"] for each in records], return_tensors="pt")).logits
    assert logits.argmax(1).tolist() == [each["label"] for each in records]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(methods=("dense", "magic")), "methods: expected some of dense, allocate, .*, got magic"),
        (dict(methods=()), "methods: expected at least 1, got 0"),
        (dict(seeds=()), "seeds: expected at least 1, got 0"),
        (dict(seeds=(1, 1)), "seeds: expected each once, got 1, 1"),
        (dict(freeze="all"), "freeze: expected one of none, codes, table, got 'all'"),
        (dict(epochs=0), "training: epochs: .*greater than 0"),
        (dict(warmup=3), "training: warmup: "),
        (
            dict(batch_size=16, accumulation=3),
            "batch_size: expected a multiple of accumulation x devices = .*, got 16",
        ),
        (dict(max_eval_samples=0), "max_eval_samples: expected at least 1, got 0"),
        (dict(max_length=200), "max_length: expected at most the model's 128, got 200"),
        (dict(ratio=0.5, methods=("svd",)), "ratio: expected at least 1"),
        (dict(data="nowhere"), "data: expected a directory, found none at nowhere"),
    ],
)
def test_wrong_arguments_are_refused(bert, data, tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        study(bert, data, tmp_path, **options)


def test_the_command_line(bert, data, tmp_path, run_command):
    def run(*arguments: object) -> str:
        done = run_command(*arguments)
        assert done.code == 0, done.err
        assert done.err == "", "no progress bars where stderr is not a terminal"
        return done.out

    command = ("glue", bert, "-o", tmp_path, "--data", data, "--ratio", 2, "--task", "sst2", "--epochs", 0.2)
    grid = ("--max-length", 16, "--methods", "dense", "svd", "--seeds", 1, 2)
    found = json.loads(run(*command, *grid, "--json"))
    assert [(score["method"], list(score["by_seed"])) for score in found["scores"]] == [
        ("dense", ["1", "2"]),
        ("svd", ["1", "2"]),
    ]
    assert "--seeds 1 2" in found["cells"][0]["command"]
    assert found["cells"][0]["settings"]["training"]["batch_size"] == 32
    assert str(tmp_path) not in json.dumps(found["cells"][0]["settings"])
    table = run(*command, *grid)
    ratio = found["scores"][1]["ratio"]
    assert f"{ratio:.2f}x" in table
    assert 2 <= ratio < 2.2
    assert f"{found['scores'][1]['mean']:.2f} ± {found['scores'][1]['spread']:.2f}" in table
    squad = ("squad", bert, "-o", tmp_path, "--data", data, "--methods", "dense", "--epochs", 0.2)
    assert "exact_match" in run(*squad, "--max-length", 96, "--stride", 8)

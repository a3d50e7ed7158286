"""lm-evaluation-harness and MTEB themselves, on tiny models and tasks of a few records."""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

T = pytest.importorskip("transformers")
pytest.importorskip("datasets")

import embkern
from embkern.evaluate import harness, run_lm_eval, run_mteb
from embkern.evaluate.harness import parse_options
from tests.example_models import build, tiny_bert, word_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Any:
    """A dense and a compressed language model, and a dense and a compressed sentence encoder."""
    path = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, model in (("gpt2", build("gpt2")), ("bert", tiny_bert(add_pooling_layer=False))):
        with torch.no_grad():  # larger than the initialisation, so that compression changes the scores
            model.get_input_embeddings().weight.mul_(50)
        model.save_pretrained(path / name)
        tokenizer = word_tokenizer()
        tokenizer.add_special_tokens({"bos_token": "[CLS]", "eos_token": "[SEP]"})
        tokenizer.save_pretrained(path / name)
        embkern.compress(path / name, ratio=6, output=path / f"{name}-small")
    return path


# ---- lm-eval ---------------------------------------------------------------------------------------------

COLORS = ["red", "green", "blue"]
DOCUMENTS = [
    {"text": f"{a} {b}", "choices": COLORS, "label": (i + j) % 3}
    for i, a in enumerate(COLORS)
    for j, b in enumerate(COLORS)
]


@pytest.fixture(scope="module")
def choices(tmp_path_factory) -> Any:
    """A directory with a task of a local file. lm-eval indexes its own tasks once, as that takes seconds."""
    tasks = pytest.importorskip("lm_eval.tasks")
    tmp_path = tmp_path_factory.mktemp("choices")
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(each) + "\n" for each in DOCUMENTS))
    (tmp_path / "colors.yaml").write_text(
        f"""
task: colors
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "documents.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        patch.setattr(tasks, "TaskManager", functools.cache(tasks.TaskManager))
        yield tmp_path


def accuracy(path: Any) -> float:
    """Compute the task's accuracy: the answer is the colour with the largest logit after the text."""
    model = T.AutoModelForCausalLM.from_pretrained(path)
    tokenizer = T.AutoTokenizer.from_pretrained(path)
    candidates = tokenizer.convert_tokens_to_ids(COLORS)
    right = 0
    for each in DOCUMENTS:
        with torch.no_grad():
            logits = model(**tokenizer(each["text"], return_tensors="pt")).logits[0, -1]
        right += int(logits[candidates].argmax()) == each["label"]
    return right / len(DOCUMENTS)


def test_lm_eval_scores_the_compressed_model_beside_the_dense_one(models, choices):
    run = run_lm_eval(
        models / "gpt2-small", ["colors"], against=models / "gpt2", include_path=choices, batch_size=4
    )
    (score,) = run.scores
    assert (run.harness, run.model, run.against) == ("lm-eval", "gpt2-small", "gpt2")
    assert (score.task, score.metric) == ("colors", "acc")
    assert (score.value, score.against) == (accuracy(models / "gpt2-small"), accuracy(models / "gpt2"))
    assert score.difference == score.value - score.against
    assert score.stderr > 0
    assert run.results[0]["n-samples"]["colors"] == {"original": 9, "effective": 9}
    assert "samples" not in run.results[0]


def test_lm_eval_refuses_unknown_names_and_unusable_models(models, choices):
    with pytest.raises(ValueError, match="tasks: lm-eval knows no colours"):
        run_lm_eval(models / "gpt2", ["colors", "colours"], include_path=choices)
    with pytest.raises(ValueError, match="options: expected some of .*num_fewshot.*, got fewshot"):
        run_lm_eval(models / "gpt2", ["colors"], include_path=choices, fewshot=1)
    with pytest.raises(ValueError, match="model: expected a language model that generates, got BertModel"):
        run_lm_eval(models / "bert", ["colors"], include_path=choices)


# ---- mteb ------------------------------------------------------------------------------------------------

PAIRS = [
    ("red", "red green", 4),
    ("blue", "green", 1),
    ("red blue", "blue red", 5),
    ("green", "red red blue", 0),
]


@pytest.fixture
def pairs(monkeypatch) -> Any:
    """A task of a few pairs, registered with MTEB."""
    mteb = pytest.importorskip("mteb")
    from datasets import Dataset, DatasetDict
    from mteb.abstasks import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    class Colors(AbsTaskSTS):
        metadata = TaskMetadata(
            name="Colors",
            description="pairs",
            type="STS",
            eval_langs=["eng-Latn"],
            main_score="cosine_spearman",
            dataset={"path": "local", "revision": "1"},
        )

        def load_data(self, **_: Any) -> None:
            columns = dict(zip(("sentence1", "sentence2", "score"), zip(*PAIRS, strict=True), strict=True))
            self.dataset = DatasetDict(test=Dataset.from_dict(columns))
            self.data_loaded = True

    monkeypatch.setitem(mteb.get_task.__globals__["_TASKS_REGISTRY"], "Colors", Colors)
    return Colors


def spearman(path: Any) -> float:
    """Compute the task's score: rank correlation of ratings with cosines of mean-pooled states."""
    from scipy.stats import spearmanr

    model, tokenizer = T.AutoModel.from_pretrained(path), T.AutoTokenizer.from_pretrained(path)

    def embed(text: str) -> torch.Tensor:
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)

    cosines = [float(F.cosine_similarity(embed(a), embed(b), dim=0)) for a, b, _ in PAIRS]
    return spearmanr(cosines, [score for *_, score in PAIRS]).statistic


def test_mteb_scores_the_compressed_encoder_beside_the_dense_one(models, pairs):
    run = run_mteb(models / "bert-small", [pairs()], against=models / "bert")
    (score,) = run.scores
    assert (run.harness, score.task, score.metric) == ("mteb", "Colors", "cosine_spearman")
    assert score.value == pytest.approx(spearman(models / "bert-small"))
    assert score.against == pytest.approx(spearman(models / "bert"))
    assert set(run.results[0]["Colors"]["scores"]) == {"test"}


def test_mteb_refuses_unknown_names_and_missing_models(models, pairs):
    with pytest.raises(ValueError, match="tasks: 'Colorz' not found. Did you mean: 'Colors'"):
        run_mteb(models / "bert", ["Colorz"])
    with pytest.raises(ValueError, match="options: expected some of .*public_only.*, got cache"):
        run_mteb(models / "bert", ["Colors"], cache=1)
    with pytest.raises(FileNotFoundError, match="model: .*none' is neither a local directory nor a model"):
        run_mteb(models / "none", ["Colors"])


# ---- both ------------------------------------------------------------------------------------------------


def test_the_command_lines(models, choices, pairs, run_command):
    def run(*arguments: object) -> str:
        done = run_command(*arguments)
        assert done.code == 0, done.err
        return done.out

    command = ("lm-eval", models / "gpt2-small", "--tasks", "colors", "--include-path", choices)
    found = json.loads(run(*command, "--json", "--", "--limit", 3, "--num-fewshot=0"))
    assert found["results"][0]["n-samples"]["colors"]["effective"] == 3
    assert found["command"].endswith("-- --limit 3 --num-fewshot=0")
    table = run(*command, "--against", models / "gpt2")
    assert f"{accuracy(models / 'gpt2'):.4f}" in table
    assert "difference" in table
    table = run("mteb", models / "bert", "--task", "Colors", "--device", "cpu")
    assert f"{spearman(models / 'bert'):.4f}" in table


def test_options_behind_two_dashes():
    words = [
        "--num_fewshot",
        "5",
        "--limit=0.5",
        "--apply-chat-template",
        "--gen_kwargs",
        "top_k=1,top_p=1",
    ]
    assert parse_options(words) == {
        "num_fewshot": 5,
        "limit": 0.5,
        "apply_chat_template": True,
        "gen_kwargs": "top_k=1,top_p=1",
    }
    assert parse_options([]) == {}
    with pytest.raises(ValueError, match="options: expected --name value, got '5'"):
        parse_options(["5"])
    with pytest.raises(ValueError, match="options: --x: expected YAML, got"):
        parse_options(["--x", "[1"])


@pytest.mark.parametrize(("package", "function"), [("lm_eval", run_lm_eval), ("mteb", run_mteb)])
def test_a_missing_harness_says_what_to_install(monkeypatch, package, function):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package} is needed here: pip install 'embkern\[harness\]'"):
        function("model", ["task"])


def test_scores_are_taken_from_what_lm_eval_returns():
    found = {
        "results": {
            "one": {"alias": "one", "sample_len": 3, "acc,none": 0.5, "acc_stderr,none": 0.1},
            "two": {
                "exact_match,strict": np.float32(1),
                "exact_match_stderr,strict": "N/A",
                "bypass,none": float("nan"),
            },
        }
    }
    scores = [each.model_dump(exclude={"against"}) for each in harness._scores_of_lm_eval(found)]
    assert scores == [
        {"task": "one", "metric": "acc", "value": 0.5, "stderr": 0.1},
        {"task": "two", "metric": "exact_match,strict", "value": 1, "stderr": None},
        {"task": "two", "metric": "bypass", "value": None, "stderr": None},
    ]

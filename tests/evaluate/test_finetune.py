"""Fine-tuning studies: scores by their definitions, what is trained, going on, and the data that comes in."""

from __future__ import annotations

import gc
import itertools
import json
import random
import shutil
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

T = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
for _needed in ("accelerate", "sklearn", "scipy"):
    pytest.importorskip(_needed)
from safetensors.torch import load_file

import embkern
from embkern import cli
from embkern.evaluate import GLUE, SQUAD, fine_tune, finetune, glue, squad, trainer
from embkern.evaluate.cells import RESULT_NAME, Cell, summarize
from embkern.evaluate.pretrained import Pretrained
from embkern.experiments.engine import read_result
from embkern.files import alone_in
from embkern.json_file import to_checked_json

from ..tables import quantizing  # noqa: F401 (a fixture)
from ..test_faults import largest_file

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["good", "bad", "what", "is", "the", "answer", *[f"w{i}" for i in range(94)]]
TABLE = "bert.embeddings.word_embeddings."
FAST = dict(max_length=16, batch_size=16, learning_rate=5e-3)  # and not the paper's


@pytest.fixture(autouse=True, scope="module")
def _quick_collections():
    """Trainer collects garbage after every run, among the million objects of the imports: 0.4 s each."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    """Data sets made of these files are cached with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Any:
    """A pretrained model, as far as a tiny one is: random, with a table that low rank can hold."""
    path = tmp_path_factory.mktemp("models") / "bert"
    tokenizer = T.BertTokenizer(vocab={word: i for i, word in enumerate([*SPECIAL, *WORDS])})
    torch.manual_seed(0)
    model = T.BertModel(
        T.BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=128,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(
            torch.randn(len(tokenizer), 6) @ torch.randn(6, 32) / 6**0.5
        )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def sentences(count: int, seed: int) -> list[dict]:
    """Sentences whose label is the one word among six that matters."""
    draw = random.Random(seed)
    records = []
    for i in range(count):
        words = draw.sample(WORDS[6:30], 5)
        words.insert(draw.randrange(6), WORDS[i % 2])
        records.append({"sentence": " ".join(words), "label": i % 2})
    return records


def questions(count: int, seed: int) -> list[dict]:
    """Paragraphs of 150 words, and what comes after the word "answer"."""
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


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Any:
    path = tmp_path_factory.mktemp("data")
    for split, count in (("train", 96), ("validation", 16)):
        write(path / "sst2" / f"{split}.jsonl", sentences(count, seed=count))
        write(path / "squad" / f"{split}.jsonl", questions(count // 8, seed=count))
    return path


# ---- scores ----------------------------------------------------------------------------------------------


def test_metrics_of_glue_are_those_computed_by_hand():
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


@pytest.mark.parametrize(
    ("answer", "truth", "exact", "f1"),
    [
        ("The  Eiffel-Tower!", "eiffeltower", 1, 1),
        ("a dog and an owl", "Dog and owl.", 1, 1),
        ("Theatre", "theatre", 1, 1),  # articles are words of their own
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


class Oracle:
    """In place of a trainer: predicts what a function makes of the records that it is given."""

    def __init__(self, predict: Any) -> None:
        self.predict = lambda records: SimpleNamespace(**predict(records))


@pytest.mark.parametrize("name", GLUE)
def test_right_predictions_score_100_in_every_task(bert, name):
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


# ---- windows and answers ---------------------------------------------------------------------------------


@pytest.fixture
def prepared(bert):
    """SQuAD of long paragraphs, cut into several windows each."""
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


def test_right_logits_give_every_answer_and_the_best_window_wins(prepared):
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


# ---- studies ---------------------------------------------------------------------------------------------


def study(bert: Any, source: Any, output: Any, *tasks: Any, **options: Any) -> Any:
    settings = {"methods": ("dense",), "ratio": 2.0, "data": source, **FAST, **options}
    return fine_tune(bert, tasks or [GLUE["sst2"]], output=output, **settings)


def saved(result: Any, output: Any) -> list[dict[str, torch.Tensor]]:
    """The tensors of every cell's model."""
    return [load_file(output / cell.settings.folder / "model" / "model.safetensors") for cell in result.cells]


@pytest.fixture(scope="module")
def learned(bert, data, tmp_path_factory) -> Any:
    output = tmp_path_factory.mktemp("learned")
    options: dict[str, Any] = dict(methods=("dense", "allocate"), epochs=8, freeze="none")
    options |= dict(save_steps=20, keep_models=True)
    return SimpleNamespace(result=study(bert, data, output, **options), output=output, options=options)


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


def test_an_interrupted_study_goes_on_and_ends_the_same(learned, bert, data, tmp_path, monkeypatch):
    step_end = trainer._StepBar.on_step_end

    def interrupt(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        step_end(self, args, state, control, **rest)
        if state.global_step == 45 and "allocate" in args.output_dir:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer._StepBar, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            study(bert, data, tmp_path, **learned.options)
    assert len(list(tmp_path.rglob("result.json"))) == 1
    (left,) = tmp_path.rglob("checkpoint-*")
    assert left.name == "checkpoint-40", "only the last one is kept"
    torn = left.with_name("checkpoint-60")  # killed while it was written
    torn.mkdir()
    flipped = shutil.copytree(left, left.with_name("checkpoint-50"))
    weights = bytearray((flipped / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (flipped / "model.safetensors").write_bytes(weights)

    began = []
    begin = trainer._StepBar.on_train_begin

    def note(self: Any, args: Any, state: Any, *rest: Any, **more: Any) -> None:
        began.append(state.global_step)
        begin(self, args, state, *rest, **more)

    monkeypatch.setattr(trainer._StepBar, "on_train_begin", note)
    again = study(bert, data, tmp_path, **learned.options)
    assert began == [40], "dense is finished, allocate goes on"
    assert [cell.scores for cell in again.cells] == [cell.scores for cell in learned.result.cells]
    for ours, theirs in zip(saved(again, tmp_path), saved(learned.result, learned.output), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), "to the last bit"


def test_a_study_that_was_killed_while_it_scored_only_scores(bert, data, tmp_path, monkeypatch):
    trial = dict(epochs=2, max_train_samples=32, max_eval_samples=8, keep_models=True)
    expected = study(bert, data, tmp_path / "whole", **trial)

    def kill(_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_round_as_stored", kill)
        with pytest.raises(KeyboardInterrupt):
            study(bert, data, tmp_path, **trial)
    steps = []
    monkeypatch.setattr(trainer._StepBar, "on_step_end", lambda *_, **__: steps.append(1))
    again = study(bert, data, tmp_path, **trial)
    assert not steps
    assert again.scores == expected.scores
    (ours,), (theirs,) = saved(again, tmp_path), saved(expected, tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("freeze", "trained"),
    [
        (
            "none",
            [{"weight"}, {"codes", "basis"}, {"codes", "basis", "offset"}, {"scales", "basis", "offset"}],
        ),
        ("codes", [set(), {"basis"}, {"basis", "offset"}, {"basis", "offset"}]),
        ("table", [set(), set(), set(), set()]),
    ],
)
@pytest.mark.usefixtures("quantizing")
def test_each_rule_fixes_the_same_of_every_method(bert, data, tmp_path, freeze, trained):
    methods = ("dense", "svd", "autoencoder", "quantize")  # the last one's table is packed, with a basis
    options = dict(methods=methods, freeze=freeze, epochs=2, max_train_samples=8, max_eval_samples=4)
    result = study(bert, data, tmp_path, keep_models=True, **{**options, "learning_rate": 0.1})
    for cell, after, names in zip(result.cells, saved(result, tmp_path), trained, strict=True):
        torch.manual_seed(22)
        model = GLUE["sst2"].load_model(str(bert))
        if cell.settings.method != "dense":
            embkern.compress(
                model, method=cell.settings.method, ratio=2, tokenizer=T.AutoTokenizer.from_pretrained(bert)
            )
        model.save_pretrained(tmp_path / "before")
        before = load_file(tmp_path / "before" / "model.safetensors")
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert {name.removeprefix(TABLE) for name in changed if name.startswith(TABLE)} == names, (
            cell.settings.method
        )
        assert "classifier.weight" in changed
        others = sum(tensor.numel() for name, tensor in before.items() if not name.startswith(TABLE))
        assert cell.trained_parameters == others + sum(before[TABLE + name].numel() for name in names)


def test_finished_cells_are_not_run_again(bert, data, tmp_path, monkeypatch, caplog):
    trial = dict(epochs=0.2, max_train_samples=8, max_eval_samples=4)
    first = study(bert, data, tmp_path, **trial)
    runs = []
    monkeypatch.setattr(finetune, "_run_cell", lambda *args, **_: runs.append(args[2]) or first.cells[0])
    assert study(bert, data, tmp_path, **trial) == first
    assert not runs
    for change in (
        dict(seeds=(1,)),
        dict(freeze="none"),
        dict(max_length=12),
        dict(max_eval_samples=5),
        dict(overwrite=True),
    ):
        study(bert, data, tmp_path, **{**trial, **change})
        assert len(runs) == 1, change
        runs.clear()
    assert not list(tmp_path.rglob("result.json")), "overwrite removes the cell before it runs again"
    path = tmp_path / first.cells[0].settings.folder / "result.json"
    path.parent.mkdir()
    edited = first.cells[0].model_copy(update={"seconds": 1.0})
    for content in ("{}", "{", "[" * 10**5, to_checked_json(edited).replace('"seconds": 1', '"seconds": 2')):
        path.write_text(content)
        study(bert, data, tmp_path, **trial)
        assert len(runs) == 1, content[:99]
        assert f"{path} is damaged and is measured again" in caplog.text
        runs.clear()
        caplog.clear()


def test_two_processes_are_not_at_one_cell(bert, data, tmp_path):
    trial = dict(epochs=1, max_train_samples=8, max_eval_samples=8, methods=("dense",))
    (cell,) = study(bert, data, tmp_path, **trial).cells
    folder = tmp_path / cell.settings.folder
    with alone_in(folder, "output"), pytest.raises(BlockingIOError, match="output: expected .* alone.*sst2"):
        study(bert, data, tmp_path, **trial, overwrite=True)
    assert read_result(folder / RESULT_NAME, Cell, cell.dependencies()) == cell
    study(bert, data, tmp_path, **trial)


def test_a_full_disk_under_a_checkpoint_is_named(bert, data, tmp_path):
    trial = dict(epochs=2, max_train_samples=32, max_eval_samples=8, methods=("dense",), save_steps=1)
    with largest_file(20000), pytest.raises(OSError, match=f"output: no checkpoint could .* in {tmp_path}"):
        study(bert, data, tmp_path, **trial)


def test_cells_follow_the_files_they_come_from(bert, data, tmp_path):
    source = Pretrained(str(bert), data, None, None)
    assert Pretrained(str(bert), data, None, None).model_digest == source.model_digest
    assert source.data_digest(GLUE["sst2"]) != source.data_digest(SQUAD)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in bert.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert Pretrained(str(copy), data, None, None).model_digest == source.model_digest
    (copy / "config.json").write_text("{}")
    assert Pretrained(str(copy), data, None, None).model_digest != source.model_digest
    assert Pretrained("of/hub", data, None, None).model_digest != source.model_digest
    text = tmp_path / "text.txt"
    text.write_text("good bad")
    assert Pretrained(str(bert), data, None, text).counts_digest("allocate") != source.counts_digest(
        "allocate"
    )


def test_spread_is_the_sample_standard_deviation(learned):
    cell = learned.result.cells[0]

    def of(seed: int, score: float) -> Cell:
        return cell.model_copy(
            update={"settings": cell.settings.model_copy(update={"seed": seed}), "scores": {"f1": score}}
        )

    (score,) = summarize([of(1, 1.0), of(2, 2.0), of(3, 6.0)])
    assert (score.mean, score.spread, score.by_seed) == (3, pytest.approx(7**0.5), {1: 1, 2: 2, 3: 6})
    assert str(score) == "3.00 ± 2.65"
    (alone,) = summarize([of(1, 1.0)])
    assert (alone.spread, str(alone)) == (None, "1.00")


def test_squad_is_trained_and_scored(bert, data, tmp_path):
    options = dict(max_length=96, stride=8, epochs=0.3, methods=("svd",))
    (exact, f1) = study(bert, data, tmp_path, SQUAD, **options).scores
    assert (exact.task, exact.metric, f1.metric) == ("squad", "exact_match", "f1")
    assert 0 <= exact.mean <= f1.mean < 100


# ---- data ------------------------------------------------------------------------------------------------


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
def test_unusable_data_is_named(bert, tmp_path, task, train, message):
    write(tmp_path / "validation.jsonl", [GOOD if task == "sst2" else ASKED])
    if isinstance(train, list):
        write(tmp_path / "train.jsonl", train)
    elif train is not None:
        (tmp_path / "train.jsonl").write_text(train)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        study(bert, tmp_path, tmp_path / "out", {**GLUE, "squad": SQUAD}[task], max_length=96, stride=8)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["[]", "{]", "[" * 100_000, '{"data": [{"paragraphs": [{"context": "a"}]}]}', '{"data": []}']
)
def test_json_that_is_not_squads_is_named(tmp_path, text):
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"train.json is not JSON of SQuAD's form|expected records, found none"
    ):
        SQUAD.read_split("train", tmp_path)


def test_a_hub_out_of_reach_is_said(bert, tmp_path, monkeypatch):
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


# ---- arguments and the command line ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(methods=("dense", "magic")), "methods: expected some of dense, allocate, .*, got magic"),
        (dict(methods=("rtn",)), "methods: expected some of .*, got rtn"),
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
def test_wrong_arguments_are_named(bert, data, tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        study(bert, data, tmp_path, **options)


def test_a_model_that_cannot_serve_is_named(bert, data, tmp_path):
    with pytest.raises(FileNotFoundError, match="'no/model' is neither a local directory nor on the hub"):
        study("no/model", data, tmp_path)
    with pytest.raises(ValueError, match="stride: expected less than 29 tokens"):
        study(bert, data, tmp_path, SQUAD, max_length=96, stride=29)
    tokenizer = T.AutoTokenizer.from_pretrained(bert, padding_side="left")
    with pytest.raises(
        ValueError, match="tokenizer: expected one that pads on the right, got padding_side left"
    ):
        SQUAD.prepare([datasets.Dataset.from_list([ASKED])] * 2, tokenizer, SQUAD.training)
    roberta = tmp_path / "roberta"  # its positions count from behind the padding's
    config = T.RobertaConfig(vocab_size=105, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                             intermediate_size=32, max_position_embeddings=34, pad_token_id=0)  # fmt: skip
    T.RobertaModel(config).save_pretrained(roberta)
    tokenizer.save_pretrained(roberta)
    with pytest.raises(ValueError, match="max_length: expected at most the model's 33, got 34"):
        study(roberta, data, tmp_path, max_length=34)
    small = tmp_path / "small"
    embkern.compress(bert, ratio=2, output=small)
    with pytest.raises(ValueError, match="the model's embedding is compressed already"):
        study(small, data, tmp_path / "out")


def run(monkeypatch: Any, capsys: Any, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["embkern", "evaluate", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr()
    assert end.value.code in (0, None), shown.err
    assert shown.err == "", "quiet where stderr is no terminal"
    return shown.out


def test_the_command_line(bert, data, tmp_path, monkeypatch, capsys):
    command = (
        "glue",
        bert,
        "-o",
        tmp_path,
        "--data",
        data,
        "--ratio",
        2,
        "--task",
        "sst2",
        "--epochs",
        0.2,
        "--max-length",
        16,
    )
    grid = ("--methods", "dense", "svd", "--seeds", 1, 2)
    found = json.loads(run(monkeypatch, capsys, *command, *grid, "--json"))
    assert [(score["method"], list(score["by_seed"])) for score in found["scores"]] == [
        ("dense", ["1", "2"]),
        ("svd", ["1", "2"]),
    ]
    assert "--seeds 1 2" in found["cells"][0]["command"]
    assert found["cells"][0]["settings"]["training"]["batch_size"] == 32
    assert str(tmp_path) not in json.dumps(found["cells"][0]["settings"])
    table = run(monkeypatch, capsys, *command, *grid)
    assert "2.0" in table
    mean = f"{found['scores'][1]['mean']:.2f} ± {found['scores'][1]['spread']:.2f}"
    assert mean in table
    table = run(monkeypatch, capsys, "squad", bert, "-o", tmp_path, "--data", data, "--methods", "dense",
                "--epochs", 0.2, "--max-length", 96, "--stride", 8)  # fmt: skip
    assert "exact_match" in table

"""Cells of a fine-tuning study: which ones run again, and the summary of their scores."""

from __future__ import annotations

import pytest

for _needed in ("transformers", "datasets", "accelerate", "sklearn", "scipy"):
    pytest.importorskip(_needed)
from embkern.evaluate import finetune, pretrained
from embkern.evaluate.cells import RESULT_NAME, Cell, summarize
from embkern.experiments.engine import read_result
from embkern.io.atomic import alone_in
from embkern.io.checked_json import to_checked_json
from tests.evaluate.tiny_tasks import study

pytestmark = pytest.mark.usefixtures("fine_tuning")


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


def test_a_damaged_cell_is_trained_again_to_the_same_scores(bert, data, tmp_path):
    trial = dict(epochs=1, max_train_samples=16, max_eval_samples=16, keep_models=True, freeze="none")
    (cell,) = study(bert, data, tmp_path, **trial).cells
    path = tmp_path / cell.settings.folder / RESULT_NAME
    path.write_text(path.read_text(encoding="utf-8")[:-100], encoding="utf-8")
    (again,) = study(bert, data, tmp_path, **trial).cells
    assert (again.settings, again.scores, again.steps) == (cell.settings, cell.scores, 1)
    assert read_result(path, Cell, again.dependencies()) == again


def test_a_cell_runs_again_when_its_code_has_changed(bert, data, tmp_path, monkeypatch):
    trial = dict(epochs=0.2, max_train_samples=8, max_eval_samples=4, methods=("dense", "svd", "allocate"))
    cell = study(bert, data, tmp_path, **trial).cells[0]
    runs = []
    monkeypatch.setattr(finetune, "_run_cell", lambda *args, **_: runs.append(args[2].method) or cell)
    for changed, again in (
        ("method_code", ["svd", "allocate"]),
        ("frequencies_code", ["allocate"]),
        ("code_hash", ["dense", "svd", "allocate"]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(pretrained, changed, lambda *_, **__: "sha256:changed")
            study(bert, data, tmp_path, **trial)
        assert runs == again, changed
        runs.clear()
    study(bert, data, tmp_path, **trial)
    assert not runs, "the results of the former code are still there"


def test_two_processes_cannot_run_the_same_cell(bert, data, tmp_path):
    trial = dict(epochs=1, max_train_samples=8, max_eval_samples=8, methods=("dense",))
    (cell,) = study(bert, data, tmp_path, **trial).cells
    folder = tmp_path / cell.settings.folder
    with alone_in(folder, "output"), pytest.raises(BlockingIOError, match="output: expected .* alone.*sst2"):
        study(bert, data, tmp_path, **trial, overwrite=True)
    assert read_result(folder / RESULT_NAME, Cell, cell.dependencies()) == cell
    study(bert, data, tmp_path, **trial)


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

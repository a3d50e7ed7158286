"""A run of Trainer: frozen parameters, checkpoints, interruptions and full disks."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

for _needed in ("transformers", "datasets", "accelerate", "sklearn", "scipy"):
    pytest.importorskip(_needed)
import transformers as T
from safetensors.torch import load_file

import embkern
from embkern.evaluate import GLUE, trainer
from tests.evaluate.tiny_tasks import saved, study
from tests.example_tables import quantizing  # noqa: F401 (a fixture)
from tests.test_faults import largest_file

pytestmark = pytest.mark.usefixtures("fine_tuning")


TABLE = "bert.embeddings.word_embeddings."


def test_an_interrupted_study_resumes_and_ends_with_the_same_bits(learned, bert, data, tmp_path, monkeypatch):
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
    assert began == [40], "dense is finished, allocate resumes"
    assert [cell.scores for cell in again.cells] == [cell.scores for cell in learned.result.cells]
    for ours, theirs in zip(saved(again, tmp_path), saved(learned.result, learned.output), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), "to the last bit"


def test_a_study_killed_while_scoring_does_not_train_again(bert, data, tmp_path, monkeypatch):
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
def test_each_freeze_rule_fixes_the_same_parameters_of_every_method(bert, data, tmp_path, freeze, trained):
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


def test_a_full_disk_is_reported_for_a_checkpoint(bert, data, tmp_path):
    trial = dict(epochs=2, max_train_samples=32, max_eval_samples=8, methods=("dense",), save_steps=1)
    with largest_file(20000), pytest.raises(OSError, match=f"output: no checkpoint could .* in {tmp_path}"):
        study(bert, data, tmp_path, **trial)

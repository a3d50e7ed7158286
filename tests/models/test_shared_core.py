"""Tables of a model that share a central core: stored once, loaded, trained and dequantised together."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

T = pytest.importorskip("transformers")

import embkern
from embkern import EmbkernConfig
from embkern.models.checkpoint import model_bytes
from embkern.models.swap import table_modules
from tests import example_models
from tests.example_models import outputs
from tests.models.compressing import reload

RECIPE = {"method": "tensor_train", "ratio": 2}
OPTIONS = {"scales": False, "share_core": True}
TABLES = {
    "gpt2": ["input", "wpe"],
    "llama-untied": ["input", "output"],
    "bert": ["input", "position_embeddings"],
    "t5-untied": ["input", "output"],
}


def build(name):
    if name != "t5-untied":
        return example_models.build(name)
    torch.manual_seed(0)
    config = example_models.build("t5").config
    config.tie_word_embeddings = False
    return T.T5ForConditionalGeneration(config).eval()


def shared(name):
    model = build(name)
    report = embkern.compress(model, **RECIPE, tables=TABLES[name], **OPTIONS)
    return model, report


def assert_one_core(model):
    modules = table_modules(model)
    assert len({module.table_name for module in modules}) == 2
    assert all(module.core_2 is modules[0].core_2 for module in modules)
    assert all(torch.equal(module.table.core_2, modules[0].table.core_2) for module in modules)


@pytest.mark.parametrize("name", TABLES)
def test_round_trip(tmp_path, name):
    before = model_bytes(build(name))
    model, report = shared(name)
    assert_one_core(model)
    first, second = report.tables
    assert "core_2" in first.parts
    assert "core_2" not in second.parts
    assert report.compressed_bytes == sum(first.parts.values()) + sum(second.parts.values())
    assert report.compressed_bytes <= report.table_bytes / 2
    assert model_bytes(model) == before - report.table_bytes + report.compressed_bytes
    loaded = reload(model, tmp_path / "saved")
    assert_one_core(loaded)
    assert torch.equal(outputs(loaded), outputs(model))
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    assert sum(key.endswith("core_2") for key in tensors) == 1
    assert sum(each.nbytes for each in tensors.values()) == model_bytes(model)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 4
    (state,) = config["named_tables"].values()
    assert state["shares"] == {"core_2": ""}
    small = outputs(model)
    loaded.dequantize()
    assert_close(outputs(loaded), small, atol=2e-6, rtol=1e-5)
    assert_close(outputs(reload(loaded, tmp_path / "dense")), small, atol=2e-6, rtol=1e-5)


def test_a_model_is_compressed_while_it_is_loaded(tmp_path):
    build("gpt2").save_pretrained(tmp_path)
    config = EmbkernConfig(**RECIPE, tables=TABLES["gpt2"], options=OPTIONS)
    loaded = type(build("gpt2")).from_pretrained(tmp_path, quantization_config=config)
    assert_one_core(loaded)
    assert torch.equal(outputs(loaded), outputs(shared("gpt2")[0]))


@pytest.mark.parametrize("name", TABLES)
def test_the_core_is_trained_for_all_tables(tmp_path, name):
    model, _ = shared(name)
    adjustments = embkern.unfreeze_table(model)
    assert len({id(each.core_2) for each in adjustments.values()}) == 1
    optimizer, before = torch.optim.AdamW(model.parameters(), lr=1e-2), table_modules(model)[0].table.core_2
    ids, losses = torch.arange(3, 21).reshape(2, 9), []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert_one_core(model)
    assert not torch.equal(table_modules(model)[0].table.core_2, before)
    trained = outputs(model.eval())
    loaded = reload(model, tmp_path)
    assert_one_core(loaded)
    assert_close(outputs(loaded), trained, atol=1e-6, rtol=1e-5)
    embkern.freeze_table(model)
    assert_one_core(model)
    assert_close(outputs(model), trained, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "t5-untied"])
def test_the_trainer_resumes(tmp_path, name):
    pytest.importorskip("accelerate")
    ids = torch.arange(3, 21).reshape(2, 9)
    data = [{"input_ids": row, "labels": row} for row in ids]

    def trained(folder, steps, resumed=None):
        loaded = type(build(name)).from_pretrained(tmp_path / "small")
        embkern.unfreeze_table(loaded)
        arguments = T.TrainingArguments(
            tmp_path / folder, max_steps=4, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
        )
        trainer = T.Trainer(loaded, arguments, train_dataset=data)
        trainer.add_callback(StopAfter(steps))
        trainer.train(resume_from_checkpoint=resumed)
        return trainer.model.eval()

    class StopAfter(T.TrainerCallback):
        def __init__(self, steps):
            self.steps = steps

        def on_step_end(self, args, state, control, **more):
            control.should_training_stop |= state.global_step >= self.steps

    shared(name)[0].save_pretrained(tmp_path / "small")
    whole = trained("whole", 4)
    stopped = trained("stopped", 2)
    resumed = trained("stopped", 4, str(tmp_path / "stopped" / "checkpoint-2"))
    assert_one_core(resumed)
    # A checkpoint has the tables with their changes, which are rounded once more.
    assert_close(outputs(resumed), outputs(whole), atol=1e-5, rtol=1e-4)
    assert float((outputs(resumed) - outputs(stopped)).abs().max()) > 1e-3


def test_what_is_refused(tmp_path):
    model, _ = shared("gpt2")
    with pytest.raises(ValueError, match="table: expected all tables that share a central core, or None"):
        embkern.unfreeze_table(model, "wpe")
    with pytest.raises(ValueError, match="expected three cores"):
        embkern.compress(build("gpt2"), **RECIPE, tables=TABLES["gpt2"], share_core=True, cores=2)
    alone = build("gpt2")
    embkern.compress(alone, **RECIPE, tables="input", **OPTIONS)  # one table has a core of its own
    assert not alone.hf_quantizer.quantization_config.named_tables

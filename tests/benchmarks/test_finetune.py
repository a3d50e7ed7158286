"""The benchmark of fine-tuning, on a tiny model."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import embkern
from benchmarks import finetune
from tests.example_models import build


@pytest.mark.parametrize("table", ["dense", "packed", "packed" + finetune.AS_STORED])
def test_losses_and_movements_of_rows(table):
    model = build("llama-tied")
    if table != "dense":
        embkern.compress(model, ratio=4, calibrate=False)
    ids = torch.arange(3, 21).reshape(2, 9)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * finetune.BATCHES
    task = finetune.Task(6, 2, 9, 1, finetune.causal_loss)
    before = model.get_input_embeddings().weight.detach().clone()
    found = finetune.train(model, table, "AdamW", 1e-3, task, batches, ids.unique())
    assert len(found["loss"]) == 6
    # Parameters that are trained as stored are what a delta is compared with: their loss may rise.
    assert found["loss"][-1] < found["loss"][0] or table.endswith(finetune.AS_STORED)
    assert 0 < found["read_median"] <= found["read_max"]
    assert found["read_max"] < 1 or table.endswith(finetune.AS_STORED)
    assert torch.equal(model.get_input_embeddings().weight, before), "a copy is trained"


def test_a_sentence_is_cut_into_parts_without_loss():
    assert finetune._parts("a b c d e", 2) == ["a b", "c d e"]
    assert finetune._parts("a b", 1) == ["a b"]

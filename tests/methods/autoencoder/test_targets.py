"""The norms of the rows: computed once, and passed to every call of the loss with the rows they belong to."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from embkern.io.mapped_table import TableFile
from embkern.methods import autoencoder, base
from embkern.methods.autoencoder import objective
from embkern.methods.autoencoder.targets import Targets, TargetSection, row_norms
from embkern.methods.sharded import World
from tests.methods.autoencoder.runs import QUICK


def assert_norms_belong(targets):
    """A norm is rounded once, so that it is within an ulp."""
    assert targets.norms.is_contiguous()
    assert_close(targets.norms.double(), targets.rows.double().norm(dim=1), rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_norms_of_a_file_are_those_of_the_rows_in_memory(table, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "BLOCK_ROWS", 7)
    table = table.to(dtype)
    save_file({"t": table}, tmp_path / "t")
    norms = row_norms(table)
    assert norms.dtype == base.training_dtype(table)
    assert_norms_belong(Targets(table, norms))
    assert torch.equal(row_norms(TableFile(tmp_path / "t", "t")), norms)
    assert torch.equal(torch.cat([row_norms(rows) for rows in table.split(19)]), norms)


@pytest.mark.parametrize("shards", [1, 3])
def test_blocks_have_the_norms_of_their_rows(table, shards, monkeypatch):
    monkeypatch.setattr(base, "BLOCK_ROWS", 7)
    sections = [TargetSection.of(section) for section in World(shards).sections(table)]
    whole = [targets for section in sections for targets in section.blocks()]
    assert torch.equal(torch.cat([targets.rows for targets in whole]), table)
    few, outside = torch.tensor([0, 3, 39, 40, 41, 100]), torch.tensor([119])
    for ids in (few, outside, torch.arange(len(table))):
        some = [targets for section in sections for targets in section.blocks_of(ids)]
        assert torch.equal(torch.cat([targets.rows for targets in some]), table[ids])
        whole += some
    for targets in whole:
        assert_norms_belong(targets)


@pytest.fixture
def calls(monkeypatch):
    """Record the targets of every call of the ops that compute the loss."""
    found = []
    forward, loss = objective.autoencoder_forward, objective.cosine_mse_loss

    def recorded_forward(target, parameters, target_norm, *rest, **options):
        found.append(Targets(target.clone(), target_norm.clone()))
        return forward(target, parameters, target_norm, *rest, **options)

    def recorded_loss(output, target, *, target_norm, **options):
        found.append(Targets(target.clone(), target_norm.clone()))
        return loss(output, target, target_norm=target_norm, **options)

    monkeypatch.setattr(objective, "autoencoder_forward", recorded_forward)
    monkeypatch.setattr(objective, "cosine_mse_loss", recorded_loss)
    return found


@pytest.mark.parametrize(
    "options",
    [
        dict(engine="torch"),
        dict(activation="elu"),
        dict(batch_size=120),
        dict(world=World(3), rmse_weight=0.5),
        dict(world=World(3), activation="elu"),
    ],
    ids=["steps", "elu", "whole table", "shards", "shards, elu"],
)
@pytest.mark.parametrize("mapped", [False, True], ids=["memory", "file"])
def test_every_loss_is_computed_with_known_norms(table, options, mapped, tmp_path, calls, monkeypatch):
    monkeypatch.setattr(base, "BLOCK_ROWS", 50)
    if mapped:
        save_file({"t": table}, tmp_path / "t")
    autoencoder(TableFile(tmp_path / "t", "t") if mapped else table, 3, **QUICK | options)
    for targets in calls:
        assert_norms_belong(targets)
    # Every epoch takes steps on all rows and measures all of them.
    assert sum(len(targets.rows) for targets in calls) >= 2 * QUICK["epochs"] * len(table)

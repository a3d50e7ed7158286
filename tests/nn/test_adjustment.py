"""``Adjustment``: training relative to what is stored, at learning rates that suit dense rows."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from embkern.nn.adjustment import Adjustment
from embkern.nn.base import CompressedEmbedding
from embkern.nn.packed import PackedTableModule
from tests.conftest import compile_counting
from tests.nn.layers import PACKED, layer

EVERY = torch.arange(13)


def frozen(kind: str, **kwargs) -> CompressedEmbedding:
    embedding = layer(kind, **kwargs)
    embedding.adjust(None)
    return embedding


def per_row(kind: str) -> str:
    return "scales" if kind == PACKED else "codes"


def trained_for(
    embedding: CompressedEmbedding, optimizer: torch.optim.Optimizer, target: Tensor, steps: int
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (embedding(EVERY) * target).sum().backward()
        optimizer.step()


def test_a_table_is_the_same_before_it_is_trained(kind):
    embedding = frozen(kind, padding_idx=3, scale=2.0)
    hidden, head = torch.randn(5, 8), embedding.head()
    before = embedding(EVERY), head(hidden), head.loss(hidden, EVERY[:5])
    assert not any(each.requires_grad for each in before)
    adjustment = embedding.unfreeze()
    head.adjust(adjustment)
    after = embedding(EVERY), head(hidden), head.loss(hidden, EVERY[:5])
    assert all(each.requires_grad for each in after)
    assert_close(after, before)
    assert embedding.unfreeze() is adjustment
    assert {name for name, _ in adjustment.named_parameters()} == {per_row(kind), "basis", "offset"}
    assert not any(each.any() for each in adjustment.parameters())
    assert {each.dtype for each in adjustment.parameters()} == {torch.float32}


def test_gradients_never_reach_the_stored_tensors(kind):
    embedding = frozen(kind)
    for adjusted in (False, True):
        if adjusted:
            embedding.unfreeze()
        for stored in embedding._parameters.values():
            stored.requires_grad = True  # as scripts do to all parameters of a model
        expected = (
            nullcontext() if adjusted else pytest.warns(UserWarning, match="gets no gradients: .*unfreeze")
        )
        with expected:
            loss = embedding(EVERY).sum() + embedding.head()(torch.randn(2, 8)).sum()
        assert loss.requires_grad == adjusted
    loss.backward()
    assert all(stored.grad is None for stored in embedding._parameters.values())
    assert all(each.grad.any() for each in embedding.adjustment.parameters())


def test_sgd_moves_rows_by_the_projection_of_a_dense_step_on_their_direction():
    embedding, lr = frozen(PACKED, offset=False), 0.01
    before, target = embedding(EVERY), torch.randn(13, 8)
    adjustment = embedding.unfreeze()
    adjustment.basis.requires_grad_(False)
    trained_for(embedding, torch.optim.SGD(adjustment.parameters(), lr), target, 1)
    along = nn.functional.normalize(before, dim=1)
    expected = before - lr * (target * along).sum(1, keepdim=True) * along
    assert_close(embedding(EVERY), expected)


def test_sgd_moves_rows_of_factors_by_at_most_a_dense_step(kind):
    embedding, lr = frozen("factors"), 0.01
    with torch.no_grad():
        embedding.codes *= 1e3  # sizes that a dense table does not have
        embedding.basis *= 1e-3
    before, target = embedding(EVERY), torch.randn(13, 8)
    adjustment = embedding.unfreeze()
    for name in ("basis", "offset"):
        getattr(adjustment, name).requires_grad_(False)
    trained_for(embedding, torch.optim.SGD(adjustment.parameters(), lr), target, 1)
    moved = embedding(EVERY) - before
    assert (moved.norm(dim=1) <= lr * target.norm(dim=1) * (1 + 1e-3)).all()
    assert moved.norm() > lr * target.norm() / 100


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_adam_moves_entries_by_about_the_learning_rate_at_most(kind, size):
    embedding, lr = frozen(kind), 1e-3
    with torch.no_grad():
        for name in (per_row(kind), "offset"):
            getattr(embedding, name).mul_(size)
    before = embedding(EVERY)
    adjustment = embedding.unfreeze()
    for name, change in adjustment.named_parameters():
        change.requires_grad_(name != "offset")
    trained_for(embedding, torch.optim.Adam(adjustment.parameters(), lr), torch.randn(13, 8), 1)
    moved = (embedding(EVERY) - before).abs()
    # A step of Adam is lr per parameter: sqrt(r) lr per row of codes, lr per entry through the basis.
    allowed = lr * (1 + math.sqrt(3)) * (1 + 1e-2) + 1e-5 * size
    assert moved.mean(0).max() <= allowed
    assert moved.max() > lr / 1000


def test_changes_of_a_16_bit_table_add_up(kind):
    embedding = frozen(kind).bfloat16()
    before = embedding.weight.clone()
    adjustment = embedding.unfreeze()
    assert embedding(EVERY).dtype == embedding.head()(torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16
    optimizer = torch.optim.SGD(adjustment.parameters(), 1e-4)
    trained_for(embedding, optimizer, -before, 1)
    assert_close(embedding.weight, before, rtol=2**-7, atol=1e-3)  # a step is less than a bit
    trained_for(embedding, optimizer, -before, 2000)
    grown = float(embedding.weight.detach().norm() / before.norm())
    assert grown > 1.05
    embedding.fold()
    assert float(embedding.weight.detach().norm() / before.norm()) == pytest.approx(grown, rel=0.02)


def test_folding_keeps_the_rows_and_begins_again_from_zero(kind):
    embedding = frozen(kind)
    adjustment = embedding.unfreeze()
    trained_for(embedding, torch.optim.SGD(adjustment.parameters(), 0.1), torch.randn(13, 8), 3)
    trained, stored = embedding(EVERY), embedding._stored()
    assert_close(embedding.table.to_dense(), trained)
    assert_close(embedding.weight, trained)
    embedding.fold()
    assert embedding.adjustment is adjustment
    assert not any(each.any() for each in adjustment.parameters())
    assert_close(embedding(EVERY), trained)
    assert all(getattr(embedding, name) is tensor for name, tensor in stored.items()), (
        "in place, as heads share"
    )
    embedding.adjust(None)
    assert not embedding(EVERY).requires_grad


def test_state_dicts_with_and_without_the_changes(kind):
    embedding = frozen(kind)
    adjustment = embedding.unfreeze()
    trained_for(embedding, torch.optim.SGD(adjustment.parameters(), 0.1), torch.randn(13, 8), 3)
    trained = embedding(EVERY)
    other = layer(kind)
    other.unfreeze()
    other.load_state_dict(embedding.state_dict())
    assert torch.equal(other(EVERY), trained)
    saved = embedding.table.tensors()  # as a saved model has it
    other.load_state_dict(saved)
    assert not any(each.any() for each in other.adjustment.parameters()), "the changes are in the table"
    assert_close(other(EVERY), trained)
    for copied in (copy.deepcopy(embedding), copy.deepcopy(embedding).double()):
        assert_close(copied(EVERY).float(), trained)


def test_requires_grad_of_a_frozen_table_is_that_of_its_changes(kind):
    embedding = frozen(kind)
    with pytest.raises(
        RuntimeError, match=r"Embedding: .* is frozen; to train it, call embkern.unfreeze_table\(model\)"
    ):
        embedding.requires_grad_(True)
    assert isinstance(embedding.unfreeze(), Adjustment)
    embedding.requires_grad_(False).requires_grad_(True)
    names = {name for name, each in embedding.named_parameters() if each.requires_grad}
    assert names == {f"adjustment.{name}" for name in (per_row(kind), "basis", "offset")}
    embedding.requires_grad_(False)
    assert not any(each.requires_grad for each in embedding.parameters())
    head = embedding.head(nn.Parameter(torch.zeros(13)))
    assert head.adjustment is embedding.adjustment
    head.requires_grad_(True)
    assert head.bias.requires_grad


def test_it_compiles_fullgraph(kind):
    embedding = frozen(kind, padding_idx=0, scale=3.0)
    embedding.unfreeze()
    head = embedding.head()
    compiled, graphs = compile_counting(lambda ids: head(embedding(ids)).square().mean())
    for count in (4, 7, 20):
        ids = torch.randint(0, 13, (2, count))
        assert_close(compiled(ids), head(embedding(ids)).square().mean())
    assert len(graphs) == 2


def test_rows_without_length_are_left_alone():
    embedding = frozen(PACKED, offset=False)
    with torch.no_grad():
        embedding.scales[3] = 0
    units = PackedTableModule._units(embedding)
    assert all(unit.isfinite().all() for unit in units.values())

"""``PackedEmbeddingBag`` against ``nn.EmbeddingBag`` over the decoded table."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from embkern import PackedEmbeddingBag
from embkern.methods import allocate
from tests.conftest import seed_of

V, H = 90, 40
IDS = torch.tensor([3, 5, 3, 89, 0, 0, 7, 41, 3])
OFFSETS = torch.tensor([0, 3, 3, 5])  # the second bag is empty


@pytest.fixture
def table():
    torch.manual_seed(seed_of(0))
    return allocate(torch.randn(V, H), ratio=3)


def dense_bag(bag, **options) -> nn.EmbeddingBag:
    weight = bag.weight.detach().clone()
    return nn.EmbeddingBag.from_pretrained(weight, freeze=False, mode=bag.mode, **options)


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bags_equal_those_of_the_decoded_table(table, mode, dtype):
    bag = PackedEmbeddingBag(table, mode=mode, dtype=dtype)
    expected = dense_bag(bag)
    for ids, offsets in ((IDS, OFFSETS), (IDS.int(), OFFSETS.int()), (IDS.view(3, 3), None)):
        assert_close(bag(ids, offsets), expected(ids, offsets))
    assert bag(IDS, OFFSETS).dtype == dtype
    bag = PackedEmbeddingBag(table, mode=mode, include_last_offset=True, padding_idx=3)
    expected = dense_bag(bag, include_last_offset=True, padding_idx=3)
    ends = torch.cat([OFFSETS, torch.tensor([9])])
    assert_close(bag(IDS, ends), expected(IDS, ends))
    without = torch.tensor([1, 2])
    assert_close(bag(without, torch.tensor([0, 2])), expected(without, torch.tensor([0, 2])))


def test_weights_of_samples_and_gradients(table):
    bag = PackedEmbeddingBag(table, mode="sum", dtype=torch.float64)
    factors = torch.rand(len(IDS), dtype=torch.float64, requires_grad=True)
    rows = bag.weight
    whole = torch.stack(
        [(factors[a:b, None] * rows[IDS[a:b]]).sum(0) for a, b in ((0, 3), (3, 3), (3, 5), (5, 9))]
    )
    assert_close(bag(IDS, OFFSETS, factors), whole)
    seed = torch.randn_like(whole)
    wanted = torch.autograd.grad(whole, [bag.scales, factors], seed)
    assert_close(torch.autograd.grad(bag(IDS, OFFSETS, factors), [bag.scales, factors], seed), wanted)


def test_empty_bags_and_ids_out_of_range(table):
    bag = PackedEmbeddingBag(table)
    none = torch.tensor([], dtype=torch.int64)
    assert torch.equal(bag(none, torch.tensor([0, 0])), torch.zeros(2, H, dtype=table.dtype))
    assert bag(none, none).shape == (0, H)
    for wrong in (-1, V):
        with pytest.raises(IndexError):
            bag(torch.tensor([wrong]), torch.tensor([0]))
    with pytest.raises(ValueError, match="mode: expected mean, sum or max, got 'median'"):
        PackedEmbeddingBag(table, mode="median")
    with pytest.raises(ValueError, match=f"padding_idx: expected an id below {V}, got {V}"):
        PackedEmbeddingBag(table, padding_idx=V)


def test_the_state_has_the_bytes_of_the_table(table):
    bag = PackedEmbeddingBag(table, dtype=torch.float32)
    state = bag.state_dict()
    for name, tensor in table.tensors().items():
        assert torch.equal(state[name], tensor), name
        assert state[name].dtype == tensor.dtype
    again = PackedEmbeddingBag.from_state(state)
    assert torch.equal(again(IDS, OFFSETS), bag(IDS, OFFSETS))
    for other in (copy.deepcopy(bag), pickle.loads(pickle.dumps(bag))):
        assert torch.equal(other(IDS, OFFSETS), bag(IDS, OFFSETS))
        assert all(torch.equal(other.state_dict()[name], each) for name, each in state.items())
    fresh = PackedEmbeddingBag(table, dtype=torch.float32)
    with torch.no_grad():
        fresh.scales.zero_()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(IDS, OFFSETS), bag(IDS, OFFSETS))


@pytest.mark.parametrize("name", ["records", "directory", "tiers", "scales"])
def test_a_changed_state_is_refused(table, name):
    state = PackedEmbeddingBag(table).state_dict()
    changed = state[name].clone()
    changed.view(-1)[0] += 1
    with pytest.raises(ValueError, match=f"{name} was changed after it was saved"):
        PackedEmbeddingBag.from_state({**state, name: changed})
    del state[name]
    with pytest.raises(KeyError, match=name):
        PackedEmbeddingBag.from_state(state)

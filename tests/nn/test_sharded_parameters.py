"""Training tools that take parameters apart: FSDP2, which shards each, and flat vectors of all of them."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.testing import assert_close

from embkern.methods.sharded import joined
from tests.methods.processes import environments
from tests.nn.layers import layer

IDS = torch.tensor([[1, 5, 1], [12, 0, 3]])


def model_of(kind: str, trained: bool) -> nn.Sequential:
    embedding = layer(kind)
    embedding.adjust(None)
    if trained:
        embedding.unfreeze()
    return nn.Sequential(embedding, nn.Linear(8, 4))


def train(model: nn.Module) -> torch.Tensor:
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS).square().sum().backward()
        optimizer.step()
    return model(IDS).detach()


@pytest.fixture
def process_group(monkeypatch):
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    for name, value in environments(1)[0].items():
        monkeypatch.setenv(name, value)
    with joined():
        yield
        gc.collect()  # what holds the group is freed before it ends


@pytest.mark.parametrize("trained", [False, True])
def test_a_fully_sharded_model_trains_like_a_whole_one(process_group, kind, trained):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = model_of(kind, trained)
    whole, before = copy.deepcopy(model), model(IDS).detach()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    expected, found = train(whole), train(model)
    assert torch.equal(found, expected)
    assert not torch.equal(found, before)
    assert torch.equal(model[0](IDS), whole[0](IDS))


def test_parameters_are_read_from_and_written_to_a_flat_vector(kind):
    """As optimisers do that keep all parameters in one vector: writes reach the changes, not the table."""
    model = model_of(kind, trained=True)
    stored = {name: each.clone() for name, each in model.named_parameters() if not each.requires_grad}
    learned = [each for each in model.parameters() if each.requires_grad]
    expected = train(copy.deepcopy(model))
    flat, sizes = parameters_to_vector(learned).detach(), [each.numel() for each in learned]
    vector_to_parameters(flat, learned)  # parameters become views of the vector
    for _ in range(3):
        gradients = torch.autograd.grad(model(IDS).square().sum(), learned)
        flat -= 0.05 * torch.cat([each.flatten() for each in gradients])
    assert flat.split(sizes)[0].any()
    assert_close(model(IDS), expected)
    assert {"0.basis", "0.offset"} <= stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(model.get_parameter(name), tensor), name

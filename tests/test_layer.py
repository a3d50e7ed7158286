"""FactorizedEmbedding beside nn.Embedding, FactorizedHead beside a tied nn.Linear."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from embkern import FactorizedEmbedding, FactorizedHead, Factors

from .conftest import assert_no_worse_than, compile_counting


def layer(**kwargs) -> FactorizedEmbedding:
    return FactorizedEmbedding(13, 8, 3, **{"offset": True, **kwargs})


def dense_of(embedding: FactorizedEmbedding) -> nn.Embedding:
    return nn.Embedding.from_pretrained(
        embedding.weight.detach().clone(), freeze=False, padding_idx=embedding.padding_idx
    )


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_forward_is_that_of_the_dense_embedding(shape, dtype):
    embedding = layer()
    ids = torch.randint(0, 13, shape).to(dtype)
    assert_close(embedding(ids), dense_of(embedding)(ids))


def test_full_rank_is_exact():
    table = torch.randn(13, 8)
    embedding = FactorizedEmbedding.from_factors(Factors(table, torch.eye(8)))
    assert_close(embedding(torch.arange(13)), table)


def test_padding_idx_masks_the_gradient_and_keeps_the_row():
    embedding = layer(padding_idx=-1)
    assert embedding.padding_idx == 12
    ids = torch.tensor([12, 12, 3])
    embedding(ids).sum().backward()
    assert not embedding.codes.grad[12].any()
    assert embedding.codes.grad[3].any()
    assert_close(embedding.offset.grad, torch.ones(8))
    assert embedding(ids)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scale_is_rounded_to_the_dtype_of_the_weights(dtype):
    scale = 25.298221281347036  # sqrt(640), as Gemma keeps it in the weights' dtype
    embedding = layer(scale=scale).to(dtype)
    exact = embedding.codes.double() @ embedding.basis.double() + embedding.offset.double()
    exact = exact * torch.tensor(scale, dtype=dtype).double()
    got = embedding(torch.arange(13))
    assert_no_worse_than(got, embedding.weight * torch.tensor(scale, dtype=dtype), exact)
    assert got.dtype == dtype
    embedding.scale = 2.0
    assert torch.equal(embedding(torch.arange(13)), embedding.weight * 2)


def test_sparse_gives_the_gradient_of_the_rows_that_were_looked_up():
    dense, sparse = layer(padding_idx=2), layer(padding_idx=2, sparse=True)
    sparse.load_state_dict(dense.state_dict())
    ids = torch.tensor([[1, 5, 1], [2, 2, 12]])
    for embedding in (dense, sparse):
        embedding(ids).square().sum().backward()
    assert sparse.codes.grad.is_sparse
    assert_close(sparse.codes.grad.to_dense(), dense.codes.grad)
    torch.optim.SparseAdam([sparse.codes]).step()


def test_activation():
    embedding = layer(activation="elu")
    linear = embedding.codes @ embedding.basis + embedding.offset
    assert_close(embedding.weight, F.elu(linear))
    assert_close(embedding(torch.tensor([4])), F.elu(linear[4:5]))


def test_weight_is_differentiable_and_decoded_on_demand():
    embedding = layer()
    embedding.weight.sum().backward()
    assert_close(embedding.offset.grad, torch.full((8,), 13.0))
    with torch.no_grad():
        embedding.offset += 1
    assert_close(embedding.weight, embedding.codes @ embedding.basis + embedding.offset)
    assert embedding.to("meta").weight.is_meta
    assert embedding.weight.shape == (13, 8)


def test_moves_copies_and_state():
    embedding = layer(padding_idx=2, scale=2.0, activation="elu")
    ids = torch.arange(13)
    for other in (copy.deepcopy(embedding), pickle.loads(pickle.dumps(embedding))):
        assert torch.equal(other(ids), embedding(ids))
        assert other.codes is not embedding.codes
    assert list(embedding.state_dict()) == ["codes", "basis", "offset"]
    other = layer(padding_idx=2, scale=2.0, activation="elu")
    assert not torch.equal(other(ids), embedding(ids))
    other.load_state_dict(embedding.state_dict())
    assert torch.equal(other(ids), embedding(ids))
    assert embedding.double()(ids).dtype == torch.float64
    assert embedding.bfloat16()(ids).dtype == torch.bfloat16
    assert list(layer(offset=False).state_dict()) == ["codes", "basis"]
    assert embedding.factors.activation == "elu"


def test_it_trains():
    torch.manual_seed(0)
    table, embedding = torch.randn(13, 8), FactorizedEmbedding(13, 8, 8)
    optimizer = torch.optim.Adam(embedding.parameters(), 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss = F.mse_loss(embedding(torch.arange(13)), table)
        loss.backward()
        optimizer.step()
    assert loss < 1e-3


def test_initial_rows_have_unit_variance_like_nn_embedding():
    rows = FactorizedEmbedding(4000, 64, 16)(torch.arange(4000))
    assert abs(float(rows.detach().var()) - 1) < 0.15


def test_a_dense_state_dict_is_refused_with_a_reason():
    with pytest.raises(RuntimeError, match="weight is a dense table, FactorizedEmbedding holds codes"):
        layer().load_state_dict({"weight": torch.zeros(13, 8)})


def test_assigning_the_weight_is_refused_with_a_reason():
    with pytest.raises(AttributeError, match="cannot be set"):
        layer().weight = nn.Parameter(torch.zeros(13, 8))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(num_embeddings=0), ValueError, "num_embeddings: expected at least 1, got 0"),
        (dict(embedding_dim=0), ValueError, "embedding_dim: expected at least 1"),
        (dict(rank=0), ValueError, "rank: expected 1 <= rank <= H = 8, got 0"),
        (dict(rank=-2), ValueError, "got -2"),
        (dict(rank=9), ValueError, "got 9"),
        (dict(rank=2.0), TypeError, "rank: expected an integer, got 2.0"),
        (dict(padding_idx=13), ValueError, "padding_idx: expected an id below 13"),
        (dict(activation="relu"), ValueError, "activation: expected one of"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        FactorizedEmbedding(**dict(num_embeddings=13, embedding_dim=8, rank=3) | change)


def test_ids_out_of_range():
    with pytest.raises(IndexError):
        layer()(torch.tensor([13]))


def test_compiles_fullgraph():
    embedding = layer(padding_idx=0, scale=3.0)
    compiled, graphs = compile_counting(lambda ids: embedding(ids).square().sum())
    for count in (4, 7, 20):
        ids = torch.randint(0, 13, (2, count))
        assert_close(compiled(ids), embedding(ids).square().sum())
    assert len(graphs) == 2


@pytest.mark.parametrize("with_offset", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_head_is_the_tied_linear_layer(with_offset, with_bias):
    embedding = layer(offset=with_offset, scale=5.0)
    bias = nn.Parameter(torch.randn(13)) if with_bias else None
    head = FactorizedHead(embedding, bias)
    hidden = torch.randn(2, 3, 8, requires_grad=True)
    expected = F.linear(hidden, embedding.weight, bias)
    assert_close(head(hidden), expected)
    upstream = torch.randn_like(expected)
    assert_close(
        torch.autograd.grad(head(hidden), hidden, upstream), torch.autograd.grad(expected, hidden, upstream)
    )
    assert head.codes is embedding.codes
    assert (head.in_features, head.out_features) == (8, 13)


def test_head_refuses_an_activation():
    with pytest.raises(ValueError, match="activation: a tied head cannot be computed through 'elu'"):
        FactorizedHead(layer(activation="elu"))


def test_head_never_decodes_the_table(monkeypatch):
    head = FactorizedHead(layer())
    monkeypatch.setattr("embkern.layer.gather_project", None)
    head(torch.randn(2, 8)).sum().backward()

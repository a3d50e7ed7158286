"""``FactorizedEmbedding`` and ``PackedEmbedding`` as drop-ins for ``nn.Embedding``."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from embkern import FactorizedEmbedding, Factors
from embkern.nn import layer_of
from tests.conftest import assert_no_worse_than, compile_counting
from tests.nn.layers import PACKED, dense_of, layer


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_forward_is_that_of_the_dense_embedding(shape, dtype, kind):
    embedding = layer(kind)
    ids = torch.randint(0, 13, shape).to(dtype)
    assert_close(embedding(ids), dense_of(embedding)(ids))


def test_full_rank_is_exact():
    table = torch.randn(13, 8)
    embedding = FactorizedEmbedding.from_factors(Factors(table, torch.eye(8)))
    assert_close(embedding(torch.arange(13)), table)


def test_padding_idx_masks_the_gradient_and_keeps_the_row(kind):
    embedding = layer(kind, padding_idx=-1)
    assert embedding.padding_idx == 12
    ids = torch.tensor([12, 12, 3])
    embedding(ids).sum().backward()
    per_row = next(embedding.parameters()).grad  # of codes or scales
    assert not per_row[12].any()
    assert per_row[3].any()
    assert_close(embedding.offset.grad, torch.ones(8))
    assert embedding(ids)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scale_is_rounded_to_the_dtype_of_the_weights(dtype, kind):
    scale = 25.298221281347036  # sqrt(640), as Gemma keeps it in the weights' dtype
    embedding = layer(kind, scale=scale).to(dtype)
    exact = copy.deepcopy(embedding).double().weight * torch.tensor(scale, dtype=dtype).double()
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


def test_weight_is_differentiable_and_decoded_on_demand(kind):
    embedding = layer(kind)
    before = embedding.weight.clone()
    before.sum().backward()
    assert_close(embedding.offset.grad, torch.full((8,), 13.0))
    with torch.no_grad():
        embedding.offset += 1
    assert_close(embedding.weight, before + 1)
    assert embedding.to("meta").weight.is_meta
    assert embedding.weight.shape == (13, 8)


def test_moves_copies_and_state(kind):
    kwargs = dict(padding_idx=2, scale=2.0)
    embedding, ids = layer(kind, **kwargs), torch.arange(13)
    first = next(iter(embedding.tensors()))
    for other in (copy.deepcopy(embedding), pickle.loads(pickle.dumps(embedding))):
        assert torch.equal(other(ids), embedding(ids))
        assert getattr(other, first) is not getattr(embedding, first)
    assert sorted(embedding.state_dict()) == sorted(embedding.table.tensors())
    other = layer(kind, **kwargs)
    assert not torch.equal(other(ids), embedding(ids))
    other.load_state_dict(embedding.state_dict())
    assert torch.equal(other(ids), embedding(ids))
    assert embedding.double()(ids).dtype == torch.float64
    assert embedding.bfloat16()(ids).dtype == torch.bfloat16
    assert "offset" not in layer(kind, offset=False).state_dict()


def test_the_table_comes_back(kind):
    embedding = layer(kind)
    table = embedding.table
    assert torch.equal(table.to_dense(), embedding.weight)
    again = layer_of(table).from_table(table, padding_idx=3, scale=2.0)
    assert type(again) is type(embedding)
    assert torch.equal(again(torch.tensor([3, 4])), 2 * table.decode(torch.tensor([3, 4])))
    for name, tensor in again.tensors().items():
        shared = tensor.data_ptr() == getattr(embedding, name).data_ptr()
        assert shared or name in again.held_dtypes
        assert torch.equal(tensor, getattr(embedding, name))
    assert layer(activation="elu").factors.activation == "elu"


def test_tensors_are_laid_out_as_files_and_kernels_take_them(kind):
    table = layer(kind).table
    strided = dataclasses.replace(table, basis=table.basis.t().contiguous().t())
    embedding = layer_of(strided).from_table(strided)
    assert embedding.basis.is_contiguous()
    assert torch.equal(embedding.weight, table.to_dense())


def test_codes_of_a_packed_table_are_buffers_that_no_cast_touches():
    embedding = layer(PACKED)
    head = embedding.head()
    assert {name for name, _ in embedding.named_parameters()} == {"scales", "basis", "offset"}
    codes = {name: buffer.clone() for name, buffer in embedding.named_buffers()}
    assert sorted(codes) == ["directory", "levels", "records", "tiers"]
    for module in (embedding, head):
        module.half().float().to(torch.bfloat16)
    for name, before in codes.items():
        assert torch.equal(getattr(embedding, name), before)
        assert getattr(head, name) is getattr(embedding, name)
    embedding.requires_grad_(True)  # as fine-tuning scripts do to everything


def test_buffers_that_are_shared_are_moved_once():
    pair = nn.ModuleList([layer(PACKED)])
    pair.append(pair[0].head())
    pair._apply(lambda tensor: tensor.clone())
    assert pair[0].records is pair[1].records


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
    rows = FactorizedEmbedding(4000, 128, 64)(torch.arange(4000))
    # The variance is the mean square of 128 * 64 values of the basis, times 64: within 5 standard deviations.
    assert abs(float(rows.detach().var()) - 1) < 5 * (2 / (128 * 64)) ** 0.5


def test_a_dense_state_dict_is_refused_with_a_reason(kind):
    with pytest.raises(RuntimeError, match="weight is a dense table, .*Embedding holds .* and offset"):
        layer(kind).load_state_dict({"weight": torch.zeros(13, 8)})


def test_assigning_the_weight_is_refused_with_a_reason(kind):
    with pytest.raises(AttributeError, match="decoded from .* and offset and cannot be set"):
        layer(kind).weight = nn.Parameter(torch.zeros(13, 8))


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


def test_padding_idx_of_a_packed_table_is_checked():
    with pytest.raises(ValueError, match="padding_idx: expected an id below 13, got 13"):
        layer(PACKED, padding_idx=13)


def test_ids_out_of_range(kind):
    with pytest.raises(IndexError):
        layer(kind)(torch.tensor([13]))


def test_a_parametrization_of_a_parameter_is_looked_up(kind):
    embedding = layer(kind)
    ids, name = torch.arange(13), {"packed": "scales"}.get(kind, "codes")
    expected = copy.deepcopy(embedding)
    getattr(expected, name).data.mul_(2)

    class Double(nn.Module):
        def forward(self, parameter):
            return 2 * parameter

    nn.utils.parametrize.register_parametrization(embedding, name, Double())
    assert torch.equal(embedding(ids), expected(ids))


def test_compiles_fullgraph(kind):
    embedding = layer(kind, padding_idx=0, scale=3.0)
    compiled, graphs = compile_counting(lambda ids: embedding(ids).square().sum())
    for count in (4, 7, 20):
        ids = torch.randint(0, 13, (2, count))
        assert_close(compiled(ids), embedding(ids).square().sum())
    assert len(graphs) == 2

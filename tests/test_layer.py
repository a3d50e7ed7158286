"""Embeddings over factors and packed tables beside nn.Embedding, their heads beside a tied nn.Linear."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from embkern import FactorizedEmbedding, FactorizedHead, Factors
from embkern.nn import layer_of
from embkern.nn.base import CompressedEmbedding
from embkern.nn.packed import PackedEmbedding
from embkern.ops.gather_decode import gather_decode

from .conftest import assert_no_worse_than, compile_counting
from .tables import packed_of

FACTORS, PACKED = "factors", "packed"


@pytest.fixture(params=[FACTORS, PACKED])
def kind(request) -> str:
    return request.param


def layer(kind: str = FACTORS, *, offset: bool = True, **kwargs) -> CompressedEmbedding:
    if kind == FACTORS:
        return FactorizedEmbedding(13, 8, 3, offset=offset, **kwargs)
    return PackedEmbedding(packed_of(torch.randn(13, 8), torch.float32, offset), **kwargs)


def dense_of(embedding: CompressedEmbedding) -> nn.Embedding:
    return nn.Embedding.from_pretrained(
        embedding.weight.detach().clone(), freeze=False, padding_idx=embedding.padding_idx
    )


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
    before = embedding.weight
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
        assert tensor.data_ptr() == getattr(embedding, name).data_ptr()
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
    rows = FactorizedEmbedding(4000, 64, 16)(torch.arange(4000))
    assert abs(float(rows.detach().var()) - 1) < 0.15


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


def test_compiles_fullgraph(kind):
    embedding = layer(kind, padding_idx=0, scale=3.0)
    compiled, graphs = compile_counting(lambda ids: embedding(ids).square().sum())
    for count in (4, 7, 20):
        ids = torch.randint(0, 13, (2, count))
        assert_close(compiled(ids), embedding(ids).square().sum())
    assert len(graphs) == 2


# ---- heads -----------------------------------------------------------------------------------------------


@pytest.fixture
def in_pieces(monkeypatch) -> None:
    monkeypatch.setattr("embkern.packed_logits._ROWS", 5)  # of 13


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("with_offset", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_head_is_the_tied_linear_layer(with_offset, with_bias, kind):
    embedding = layer(kind, offset=with_offset, scale=5.0)
    bias = nn.Parameter(torch.randn(13)) if with_bias else None
    head = embedding.head(bias)
    hidden = torch.randn(2, 3, 8, requires_grad=True)
    expected = F.linear(hidden, embedding.weight, bias)
    assert_close(head(hidden), expected)
    with torch.no_grad():
        assert_close(head(hidden[0, 0]), expected[0, 0])
        assert head(hidden[:0]).shape == (0, 3, 13)
    upstream = torch.randn_like(expected)
    leaves = [hidden, *head.parameters()]
    got, wanted = (torch.autograd.grad(each, leaves, upstream) for each in (head(hidden), expected))
    assert_close(got, wanted)
    for name, tensor in embedding.named_parameters():
        assert getattr(head, name) is tensor
    assert (head.in_features, head.out_features) == (8, 13)


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_packed_head_is_as_exact_as_the_dense_one(dtype):
    embedding = layer(PACKED).to(dtype)
    hidden, upstream = torch.randn(6, 8).to(dtype), torch.randn(6, 13).to(dtype)
    results = []
    for cast in (dtype, torch.float64):
        module, h = copy.deepcopy(embedding).to(cast), hidden.to(cast).requires_grad_()
        for logits in (module.head()(h), F.linear(h, module.weight)):
            leaves = [h, *module.parameters()]
            results.append((logits, *torch.autograd.grad(logits, leaves, upstream.to(cast))))
    ours, theirs, _, exact = results
    for got, native, wanted in zip(ours, theirs, exact, strict=True):
        assert_no_worse_than(got, native, wanted)


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_few_hidden_states_meet_the_values_of_the_codes(monkeypatch, dtype):
    head = PackedEmbedding(packed_of(torch.randn(70, 40), torch.float32)).head().requires_grad_(False)
    hidden = torch.randn(3, 40).to(dtype)
    exact = copy.deepcopy(head).double()
    expected = F.linear(hidden.double(), exact.weight)
    head = head.to(dtype)
    widths = []
    decode = gather_decode

    def watched(*args, embedding_dim, **kwargs):
        widths.append(embedding_dim)
        return decode(*args, embedding_dim=embedding_dim, **kwargs)

    monkeypatch.setattr("embkern.packed_logits.gather_decode", watched)
    assert_no_worse_than(head(hidden), F.linear(hidden, head.weight), expected)
    assert set(widths) == {64}, "the values of the codes, not the rows"


@pytest.mark.usefixtures("in_pieces")
def test_a_frozen_packed_head_gives_the_gradient_of_the_hidden_states_alone():
    embedding = layer(PACKED).requires_grad_(False)
    hidden = torch.randn(2, 8, requires_grad=True)
    got = torch.autograd.grad(embedding.head()(hidden).sum(), hidden)
    assert_close(got[0], embedding.weight.sum(0).expand(2, 8))
    embedding.scales.requires_grad_(True)
    embedding.head()(hidden.detach()).sum().backward()
    assert embedding.scales.grad.any()
    assert embedding.basis.grad is None


@pytest.mark.usefixtures("in_pieces")
def test_a_packed_head_under_autocast_is_the_dense_one():
    embedding = layer(PACKED)
    hidden = torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = embedding.head()(hidden), F.linear(hidden, embedding.weight)
        assert got.dtype == torch.bfloat16
        assert_close(got, expected, atol=0.02, rtol=0.02)
        got.sum().backward()
    assert embedding.scales.grad.dtype == torch.float32


@pytest.mark.usefixtures("in_pieces")
def test_heads_compile_fullgraph(kind):
    head = layer(kind).head()
    compiled, graphs = compile_counting(lambda hidden: head(hidden).square().sum())
    for count in (4, 7, 20):
        hidden = torch.randn(2, count, 8, requires_grad=True)
        got, wanted = compiled(hidden), head(hidden).square().sum()
        assert_close(got, wanted)
        assert_close(torch.autograd.grad(got, hidden), torch.autograd.grad(wanted, hidden))
    assert len(graphs) == 2


def test_a_second_derivative_of_a_packed_head_is_refused():
    hidden = torch.randn(2, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(PACKED).head()(hidden).square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(grad.sum(), hidden)


def test_head_refuses_an_activation():
    with pytest.raises(ValueError, match="activation: a tied head cannot be computed through 'elu'"):
        FactorizedHead(layer(activation="elu"))


def test_a_head_over_factors_never_decodes_the_table(monkeypatch):
    head = FactorizedHead(layer())
    monkeypatch.setattr("embkern.layer.gather_project", None)
    head(torch.randn(2, 8)).sum().backward()


@pytest.mark.usefixtures("in_pieces")
def test_a_packed_head_never_holds_the_table(monkeypatch):
    decode, held = gather_decode, []

    def watched(ids, *args, **kwargs):
        held.append(len(ids))
        return decode(ids, *args, **kwargs)

    monkeypatch.setattr("embkern.packed_logits.gather_decode", watched)
    layer(PACKED).head()(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert set(held) == {5, 3}

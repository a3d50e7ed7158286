"""``TableEmbedding`` and ``TableHead`` over every kind of row table; no dense table at run time."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from embkern import TableEmbedding, TableHead
from tests.conftest import assert_no_worse_than, compile_counting
from tests.row_tables import NAMES, row_table

LINEAR = [name for name in NAMES if name != "pruned, error"]  # with finite logits for every id


@pytest.mark.parametrize("name", NAMES)
def test_a_lookup_is_that_of_the_decoded_table(name):
    table = row_table(name).to(torch.float64)
    embedding = TableEmbedding(table, padding_idx=3, scale=2.0)
    known = torch.arange(0, 13, 3) if name == "pruned, error" else torch.arange(13)
    for ids in (known.int(), known.repeat(2, 2), known[:0], known[1]):
        got, expected = embedding(ids), 2 * F.embedding(ids, table.to_dense(), padding_idx=3)
        assert got.shape == (*ids.shape, 8)
        assert_close(got, expected)
    leaves = list(embedding.parameters())
    upstream = torch.randn(len(known), 8).double()
    got = torch.autograd.grad(embedding(known), leaves, upstream)
    wanted = torch.autograd.grad(embedding(known), leaves, upstream * (known != 3).unsqueeze(1))
    assert_close(got, wanted)
    assert any(each.any() for each in got)
    assert embedding.weight.shape == (13, 8)
    assert_close(embedding.weight[2:5], table.to_dense()[2:5])
    for bad in (-1, 13):
        with pytest.raises(IndexError, match=f"ids: expected 0 <= id < 13, got {bad}"):
            embedding(torch.tensor([0, bad]))
    with pytest.raises(ValueError, match="padding_idx: expected an id below 13, got 13"):
        TableEmbedding(table, padding_idx=13)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", LINEAR)
def test_a_head_is_the_tied_linear_layer(name, with_bias, monkeypatch):
    monkeypatch.setattr("embkern.tables.rows.PIECE_VALUES", 40)  # five rows
    embedding = TableEmbedding(row_table(name), scale=5.0).double()
    head = embedding.head(nn.Parameter(torch.randn(13).double()) if with_bias else None)
    assert isinstance(head, TableHead)
    hidden = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    rows = embedding.table.to(torch.float64).decode(torch.arange(13))
    assert_close(head(hidden), F.linear(hidden, rows, head.bias))
    assert head(hidden[:0]).shape == (0, 3, 13)
    leaves = [hidden, *head.parameters()]
    upstream = torch.randn(2, 3, 13).double()
    expected = F.linear(hidden, embedding.weight, head.bias)
    got, wanted = (torch.autograd.grad(each, leaves, upstream) for each in (head(hidden), expected))
    assert_close(got, wanted)
    labels = torch.tensor([[1, 12, 1], [0, 5, 1]])
    options: dict[str, Any] = dict(ignore_index=1, label_smoothing=0.1, reduction="sum")
    capped = 2 * torch.tanh(head(hidden) / 2)
    expected = F.cross_entropy(capped.flatten(0, 1), labels.flatten(), **options)
    got = head.loss(hidden, labels, softcap=2.0, **options)
    assert_close(got, expected)
    assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves))
    with pytest.raises(ValueError, match="labels: expected shape"):
        head.loss(hidden, labels[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_16_bits_are_as_exact_as_a_dense_head(name, dtype):
    table = row_table(name).to(dtype)
    exact = table.to(torch.float64).to_dense()
    tiny = 1e-6 * float(exact.abs().max())
    assert_no_worse_than(table.to_dense(), exact.to(dtype), exact, tiny)
    hidden = torch.randn(6, 8).to(dtype)
    head = TableEmbedding(table).head()
    native = F.linear(hidden, exact.to(dtype))
    assert_no_worse_than(head(hidden), native, hidden.double() @ exact.t(), tiny)


def test_removed_rows_are_refused_and_never_predicted():
    embedding = TableEmbedding(row_table("pruned, error"))
    with pytest.raises(IndexError, match=r"ids: expected tokens that were kept \(unknown='error'\), got 4"):
        embedding(torch.tensor([[3, 4]]))
    hidden = torch.randn(5, 8, requires_grad=True)
    head = embedding.head()
    logits, known = head(hidden), torch.arange(13) % 3 == 0
    assert_close(logits[:, known], hidden @ embedding.kept_rows.t())
    assert (logits[:, ~known] == torch.finfo(torch.float32).min).all()
    labels = torch.tensor([0, 3, 6, 9, 12])
    expected = F.cross_entropy(hidden @ embedding.kept_rows.t(), labels // 3)
    assert_close(head.loss(hidden, labels), expected)
    assert_close(
        torch.autograd.grad(head.loss(hidden, labels), hidden), torch.autograd.grad(expected, hidden)
    )
    assert not embedding.weight[1].any()


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_casts_keep_what_is_shared(name):
    embedding = TableEmbedding(row_table(name))
    pair = nn.ModuleList([embedding, embedding.head()])
    for each in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair)), copy.deepcopy(pair).half().float()):
        first, second = each
        assert first._settings is second._settings
        assert all(getattr(first, n) is getattr(second, n) for n in first.tensor_names)
    ids = torch.tensor([0, 3, 12])
    assert torch.equal(copy.deepcopy(embedding)(ids), embedding(ids))
    assert name.partition(",")[0].split()[0] in repr(embedding).replace("_", " ") or name == "two cores"


@pytest.mark.parametrize("name", NAMES)
def test_training_moves_rows_by_a_learning_rate_or_less(name):
    embedding = TableEmbedding(row_table(name, 40))
    embedding.adjust(None)
    for parameter in embedding.parameters():
        parameter.requires_grad = True  # as scripts do
    with pytest.warns(UserWarning, match="gets no gradients"):
        embedding(torch.tensor([0]))
    adjustment = embedding.unfreeze()
    ids = torch.arange(0, 40, 3)
    before = embedding(ids).detach()
    assert_close(before, embedding.table.decode(ids))
    optimizer = torch.optim.Adam(adjustment.parameters(), lr=1e-3)
    (embedding(ids) * torch.randn(len(ids), 8)).sum().backward()
    optimizer.step()
    moved = (embedding(ids) - before).detach().abs()
    names = len(list(adjustment.parameters()))
    assert 1e-5 < float(moved.mean()) < names * 3e-3
    embedding.fold()
    assert_close(embedding.table.decode(ids), before + (embedding(ids) - before))


@pytest.mark.parametrize("name", ["scalar", "product", "tensor train", "nonlinear", "pruned, mean"])
def test_lookups_and_heads_compile_fullgraph(name):
    embedding = TableEmbedding(row_table(name))
    head = embedding.head()
    compiled, graphs = compile_counting(lambda ids: head(embedding(ids)).square().sum())
    for count in (4, 7, 12):
        ids = torch.arange(count)
        assert_close(compiled(ids), head(embedding(ids)).square().sum())
    assert len(graphs) <= 2


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the largest number of bytes of tensors that a function holds at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("name", NAMES)
def test_no_dense_table_is_held_at_run_time(name):
    V, H = 120_000, 64
    dense = 4 * V * H
    assert peak_bytes(lambda: torch.zeros(V, H)) == dense
    embedding = TableEmbedding(row_table(name, V, H)).requires_grad_(False)
    head, ids = embedding.head(), torch.arange(0, V, 3000)
    hidden, labels = torch.randn(1, H, requires_grad=True), torch.tensor([3])
    assert peak_bytes(lambda: embedding(ids)) < dense / 50
    rows = 6 * 4 * V  # logits, their gradient, and what their pieces hold
    assert peak_bytes(lambda: head(hidden).sum().backward()) < dense / 3 + rows
    assert peak_bytes(lambda: head.loss(hidden, labels).backward()) < dense / 3 + rows

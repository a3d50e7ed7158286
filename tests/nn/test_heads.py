"""Tied heads over factors and over a packed table."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from embkern import FactorizedHead
from tests.conftest import assert_no_worse_than, compile_counting
from tests.nn.layers import PACKED, layer


@pytest.mark.parametrize("with_offset", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_head_is_the_tied_linear_layer(with_offset, with_bias, kind):
    # In float64, where the order of the sums is no matter: the next test compares errors in the others.
    embedding = layer(kind, offset=with_offset, scale=5.0).double()
    bias = nn.Parameter(torch.randn(13).double()) if with_bias else None
    head = embedding.head(bias)
    hidden = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
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


def test_a_frozen_packed_head_gives_the_gradient_of_the_hidden_states_alone():
    embedding = layer(PACKED).requires_grad_(False)
    hidden = torch.randn(2, 8, requires_grad=True)
    got = torch.autograd.grad(embedding.head()(hidden).sum(), hidden)
    assert_close(got[0], embedding.weight.sum(0).expand(2, 8))
    embedding.scales.requires_grad_(True)
    embedding.head()(hidden.detach()).sum().backward()
    assert embedding.scales.grad.any()
    assert embedding.basis.grad is None


def test_a_packed_head_under_autocast_is_the_dense_one():
    embedding = layer(PACKED)
    hidden = torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = embedding.head()(hidden), F.linear(hidden, embedding.weight)
        assert got.dtype == torch.bfloat16
        assert_no_worse_than(got, expected, hidden.double() @ embedding.weight.double().t())
        got.sum().backward()
    assert embedding.scales.grad.dtype == torch.float32


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
    monkeypatch.setattr("embkern.nn.factorized.gather_project", None)
    head(torch.randn(2, 8)).sum().backward()


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_loss_of_a_head_is_that_of_its_logits(with_bias, kind):
    embedding = layer(kind, scale=5.0).double()
    head = embedding.head(nn.Parameter(torch.randn(13).double()) if with_bias else None)
    hidden = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 12, -100], [0, 5, 1]])
    options = dict(ignore_index=1, label_smoothing=0.1, reduction="sum")
    labels[0, 2] = 1
    capped = 2 * torch.tanh(head(hidden) / 2)
    expected = F.cross_entropy(capped.flatten(0, 1), labels.flatten(), **options)
    got = head.loss(hidden, labels, softcap=2.0, **options)
    assert_close(got, expected)
    leaves = [hidden, *head.parameters()]
    assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves))

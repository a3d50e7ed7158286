"""``weight`` of compressed embeddings and heads: decoded where it is read, and never written."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from embkern.nn.decoded_weight import DecodedWeight
from embkern.nn.table_module import TableModule
from tests.conftest import compile_counting
from tests.nn.layers import layer


@pytest.fixture(params=["embedding", "head"])
def module(request, kind) -> TableModule:
    embedding = layer(kind).requires_grad_(True)
    return embedding if request.param == "embedding" else embedding.head()


@pytest.fixture
def decoded(module, monkeypatch) -> list[int]:
    """How many rows each decoding has, in order."""
    rows: list[int] = []
    decode = type(module)._rows

    def counted(self, ids: Tensor, *args, **kwargs) -> Tensor:
        rows.append(ids.numel())
        return decode(self, ids, *args, **kwargs)

    monkeypatch.setattr(type(module), "_rows", counted)
    return rows


def table_of(module: TableModule) -> Tensor:
    return module.table.to_dense()


def test_what_is_known_without_a_row_decodes_none(module, decoded):
    weight = module.weight
    assert isinstance(weight, Tensor)
    assert not isinstance(weight, nn.Parameter)
    assert weight.shape == weight.size() == (13, 8)
    assert (weight.size(1), weight.ndim, weight.dim(), weight.numel(), len(weight)) == (8, 2, 2, 104, 13)
    assert (weight.dtype, weight.device, weight.is_meta) == (torch.float32, torch.device("cpu"), False)
    assert weight.requires_grad
    assert not weight.detach().requires_grad
    assert not weight.data.requires_grad
    assert (weight.is_floating_point(), weight.element_size(), weight.nbytes) == (True, 4, 416)
    assert weight.grad is None
    assert weight[2:7].shape == (5, 8)
    assert weight[-1].shape == (8,)
    assert decoded == []
    with torch.no_grad():
        assert not module.weight.requires_grad
    assert not module.bfloat16().requires_grad_(False).weight.requires_grad
    assert module.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("read", "rows"),
    [
        (lambda w: w[3] * 1, 1),
        (lambda w: w[-1, 2:5], 1),
        (lambda w: w[2:9:3] + 0, 3),
        (lambda w: w.detach()[2:9][1] * 1, 1),
        (lambda w: w[torch.tensor([[1, -1], [5, 5]])], 4),
        (lambda w: F.embedding(torch.tensor([[1, 12, 1]]), w), 3),
        (lambda w: w[torch.arange(13) % 2 == 0], 13),
        (lambda w: w[:, 3], 13),
        (lambda w: w[[1, -1, 5]], 3),
        (lambda w: w[[0, 2], [1, 1]], 13),
        (lambda w: w @ torch.ones(8), 13),
        (lambda w: F.linear(torch.ones(2, 8), w), 13),
        (lambda w: torch.index_select(w, 0, torch.tensor([4])), 13),
        (lambda w: F.embedding(torch.tensor([1]), w, scale_grad_by_freq=True), 13),
        (lambda w: torch.ones(8).add(w[5]), 1),
        (lambda w: torch.stack([w, w]), 26),
        (lambda w: w.clone(), 13),
        (lambda w: copy.deepcopy(w.detach()), 13),
        (lambda w: pickle.loads(pickle.dumps(w.detach())), 13),
        (lambda w: torch.from_numpy(w.detach().numpy()), 13),
    ],
)
def test_only_what_is_read_is_decoded(module, decoded, read, rows):
    expected = read(table_of(module))
    decoded.clear()
    got = read(module.weight)
    assert type(got) is Tensor
    assert sum(decoded) == rows
    assert_close(got, expected)


def test_gradients_flow_to_the_parameters(module):
    ids = torch.tensor([3, 4, 3])
    padded = functools.partial(F.embedding, ids, padding_idx=-9)
    for read in (padded, lambda w: w[ids[[0, 2]]], lambda w: w[3:4] * 2):
        got = torch.autograd.grad(read(module.weight).square().sum(), [*module.parameters()])
        weight = module._rows(torch.arange(13))
        if read is padded:
            weight = torch.where(torch.arange(13)[:, None] == 4, weight.detach(), weight)
        assert_close(got, torch.autograd.grad(read(weight).square().sum(), [*module.parameters()]))


@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.data.__setitem__(5, 0),
        lambda w: w.__setitem__(5, torch.zeros(8)),
        lambda w: w.copy_(torch.zeros(13, 8)),
        lambda w: w.data.copy_(torch.zeros(13, 8)),
        lambda w: w[5].zero_(),
        lambda w: w.detach()[2:4].fill_(1.0),
        lambda w: w[2:4].__setitem__((0, 1), 3.0),
        lambda w: w.__iadd__(1),
        lambda w: nn.init.normal_(w),
        lambda w: nn.init.zeros_(w),
        lambda w: nn.init.xavier_uniform_(w),
        lambda w: nn.init.trunc_normal_(tensor=w),
        lambda w: torch.add(torch.ones(8), 1, out=w),
        lambda w: F.embedding(torch.tensor([1]), w, max_norm=1.0),
        lambda w: setattr(w, "data", torch.zeros(13, 8)),
        lambda w: setattr(w, "requires_grad", not w.requires_grad),
        lambda w: w.requires_grad_(not w.requires_grad),
        lambda w: nn.Parameter(w),
        lambda w: torch.ops.aten.zero_(w),
    ],
)
def test_writing_is_refused_and_names_the_way(module, write, no_grad):
    before = table_of(module)
    with torch.set_grad_enabled(not no_grad), pytest.raises(RuntimeError, match="no write.*dequantize"):
        write(module.weight)
    assert torch.equal(table_of(module), before)


def test_what_changes_nothing_is_allowed(module):
    weight = module.weight
    assert weight.requires_grad_(True) is weight
    weight.requires_grad = True
    total = torch.zeros(13, 8)
    total += weight.detach()
    total[3] = weight[4].detach()
    assert_close(total[3], table_of(module)[4])


def test_it_shows_the_values_of_now_as_a_parameter_does(module):
    weight, copied = module.weight, module.weight.clone()
    with torch.no_grad():
        module.offset += 1
    assert_close(weight, copied + 1)
    assert "DecodedWeight" not in repr(weight)


def test_it_is_decoded_in_a_compiled_function(module):
    ids = torch.tensor([1, 2])

    def read(ids: Tensor) -> Tensor:
        weight = module.weight
        return weight[ids].to(weight.dtype).sum() + F.linear(torch.ones(1, 8), weight).sum() * weight.shape[0]

    compiled, _ = compile_counting(read)
    assert_close(compiled(ids), read(ids))


def test_an_operator_below_torch_functions_gets_the_values(module):
    with torch._C.DisableTorchFunctionSubclass():
        got = torch.mm(torch.ones(1, 13), module.weight.detach())
    assert not isinstance(got, DecodedWeight)
    assert_close(got, torch.ones(1, 13) @ table_of(module))

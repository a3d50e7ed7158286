"""low_rank_cross_entropy: numbers against float64, gradients, pieces, labels, arguments, compilation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from embkern.ops import low_rank_cross_entropy
from tests.conftest import assert_no_worse_over_draws, compile_counting
from tests.ops.test_packed_cross_entropy import DTYPES, OPTIONS, results

OP = "low_rank_cross_entropy"
SHAPES = [(301, 48, 20), (97, 33, 33), (40, 7, 1)]  # (V, H, r)


class Task:
    """Factors with an offset and a bias, hidden states whose logits spread by a few units, and labels."""

    def __init__(self, shape, states, dtype=torch.float32, device="cpu"):
        V, H, r = shape
        self.codes, self.basis = torch.randn(V, r, device=device), torch.randn(r, H, device=device)
        self.codes, self.basis = (self.codes * 3 / (r * H) ** 0.5).to(dtype), self.basis.to(dtype)
        self.offset, self.bias = torch.randn(H, device=device), torch.randn(V, device=device)
        self.hidden = torch.randn(states, H, device=device)
        self.hidden, self.offset, self.bias = (
            each.to(dtype) for each in (self.hidden, self.offset, self.bias)
        )
        self.labels = torch.randint(V, (states,), device=device)
        self.upstream = torch.randn(states, device=device)

    @property
    def leaves(self):
        return [self.hidden, self.codes, self.basis, self.offset, self.bias]

    def ours(self, labels=None, **options):
        labels = self.labels if labels is None else labels
        return lambda hidden, *factors, bias=None: low_rank_cross_entropy(
            hidden, labels, *factors[:3], bias=factors[3] if len(factors) > 3 else None, **options
        )

    def plain(self, softcap=None, **options):
        def function(hidden, codes, basis, offset, bias):
            logits = F.linear(F.linear(hidden, basis), codes)
            logits = logits + F.linear(hidden, offset.unsqueeze(0)) + bias
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            return F.cross_entropy(logits, self.labels, **options)

        return function


def assert_contract(shape, states, dtype, device, backend, trained, **options):
    options["reduction"] = "none"
    if not options.get("softcap"):  # The exact gradient of the offset is 0.
        trained = [each for each in trained if each != 3]

    def draw():
        task = Task(shape, states, dtype, device)
        if "ignore_index" in options:
            task.labels[::5] = options["ignore_index"]
        arguments = (task.leaves, task.upstream)
        ours = results(task.ours(backend=backend, **options), *arguments, dtype, trained)
        assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        native = results(task.plain(**options), *arguments, dtype, trained)
        return ours, native, results(task.plain(**options), *arguments, torch.float64, trained)

    assert_no_worse_over_draws(draw)


@pytest.fixture(params=["whole", "pieces"])
def pieces(request, monkeypatch):
    if request.param == "pieces":
        monkeypatch.setattr("embkern.ops.reference.cross_entropy.FEWEST_ROWS", 16)
        monkeypatch.setattr("embkern.ops.reference.cross_entropy.MOST_LOGITS", 1)


@pytest.mark.parametrize("trained", [range(5), (0, 2, 3), (0,)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.usefixtures("poisoned", "pieces")
def test_losses_and_gradients_are_no_worse_than_plain_torch(backend, device, dtype, options, trained):
    for shape in SHAPES:
        assert_contract(shape, 40, dtype, device, backend, trained, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("trained", [range(5), (0, 2, 3)], ids=str)
@pytest.mark.usefixtures("pieces")
def test_the_gradients_of_the_definition(options, trained):
    task = Task((40, 5, 3), 4, torch.float64)
    leaves = [each.detach().requires_grad_(i in trained) for i, each in enumerate(task.leaves)]
    assert torch.autograd.gradcheck(task.ours(reduction="none", **options), leaves)


@pytest.mark.parametrize("trained", [range(5), (0,)], ids=str)
def test_ignored_labels_empty_batches_and_reductions(device, backend, trained):
    task = Task((40, 7, 4), 6, device=device)
    task.labels[::2] = -100
    for reduction in ("mean", "sum"):
        options, one = dict(reduction=reduction), torch.ones(())
        got = results(task.ours(backend=backend, **options), task.leaves, one, torch.float32, trained)
        exact = results(task.plain(**options), task.leaves, one, torch.float64, trained)
        for each, wanted in zip(got, exact, strict=True):
            assert_close(each.double(), wanted, rtol=1e-4, atol=1e-5)
    task.labels[:] = -100
    assert task.ours(backend=backend)(*task.leaves).isnan()
    empty = Task((40, 7, 4), 0, device=device)
    assert empty.ours(backend=backend)(*empty.leaves).isnan()
    assert float(empty.ours(backend=backend, reduction="sum")(*empty.leaves)) == 0


@pytest.mark.parametrize("gap", [1.0, 40.0, 3e4])
def test_a_certain_prediction_has_an_exact_loss(device, backend, gap):
    bias = torch.tensor([0.0, -gap], device=device)
    zeros = [torch.zeros(shape, device=device) for shape in ((2, 3), (2, 1), (1, 3))]
    labels = torch.tensor([0, 1], device=device)
    options = dict(bias=bias, reduction="none", backend=backend)
    got = low_rank_cross_entropy(zeros[0], labels, *zeros[1:], **options)
    assert_close(got.cpu(), torch.tensor([math.log1p(math.exp(-gap)), gap + math.log1p(math.exp(-gap))]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(labels=torch.tensor([1, 40, 2])), IndexError, "labels: expected .* got 40 at flat position 1"),
        (dict(labels=torch.ones(3)), TypeError, "labels: expected dtype"),
        (dict(hidden=torch.ones(3, 6)), ValueError, r"basis: expected shape \(4, 6\), got \(4, 7\)"),
        (dict(hidden=torch.ones(3, 7).long()), TypeError, "hidden: expected a floating-point dtype"),
        (dict(hidden=torch.ones(3, 7, device="meta")), ValueError, "hidden: expected device cpu"),
        (dict(codes=torch.ones(40)), ValueError, r"codes: expected shape \(V, r\)"),
        (dict(basis=torch.ones(4, 7).double()), TypeError, "basis: expected dtype"),
        (dict(offset=torch.ones(6)), ValueError, r"offset: expected shape \(7,\)"),
        (dict(bias=torch.ones(39)), ValueError, r"bias: expected shape \(40,\)"),
        (dict(label_smoothing=-0.1), ValueError, "label_smoothing: expected"),
        (dict(softcap=-1.0), ValueError, "softcap: expected"),
        (dict(reduction="max"), ValueError, "reduction: expected"),
        (dict(backend="native"), RuntimeError, "cannot serve low_rank_cross_entropy"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, error, message):
    given = dict(hidden=torch.ones(3, 7), labels=torch.tensor([1, 39, 2]), codes=torch.ones(40, 4))
    given |= dict(basis=torch.ones(4, 7), offset=torch.ones(7), bias=torch.ones(40))
    with pytest.raises(error, match=message):
        low_rank_cross_entropy(**(given | change))


def test_it_compiles_without_a_break():
    task = Task((41, 33, 4), 3)
    function = lambda hidden, labels: low_rank_cross_entropy(  # noqa: E731
        hidden, labels, task.codes, task.basis, task.offset
    )
    compiled, graphs = compile_counting(function)
    for states in (6, 7, 20):  # no other tensor has a size of 6, which would be taken for the same
        hidden = torch.randn(states, 33, requires_grad=True)
        labels = torch.randint(41, (states,))
        got, expected = compiled(hidden, labels), function(hidden, labels)
        assert_close(got, expected)
        assert_close(torch.autograd.grad(got, hidden), torch.autograd.grad(expected, hidden))
    assert len(graphs) == 2


def test_a_second_derivative_is_refused():
    task = Task((40, 7, 4), 3)
    for trained in ((0,), (0, 1)):
        leaves = [each.detach().requires_grad_(i in trained) for i, each in enumerate(task.leaves)]
        (grad,) = torch.autograd.grad(task.ours()(*leaves).square(), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(grad.sum(), leaves[0])

"""packed_cross_entropy: numbers against float64, gradients, bits, labels, arguments, compilation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from embkern.ops import packed_cross_entropy, reference
from embkern.ops.library import cpu_capability
from embkern.ops.packed_format import Tier
from tests.conftest import assert_no_worse_over_draws, compile_counting
from tests.ops.packed_problems import Problem, problem

OP = "packed_cross_entropy"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (V, H, K): rows and coefficients of several groups; odd rows with groups that begin beyond them; rows within
# one group; no basis; more rows than are decoded at a time.
SHAPES = [(301, 160, 128), (97, 97, 96), (200, 33, 32), (200, 70, 0), (1100, 40, 32)]
OPTIONS = [
    {},
    dict(label_smoothing=0.1),
    dict(softcap=3.0),
    dict(softcap=3.0, label_smoothing=0.2, ignore_index=7),
]


class Task:
    """A table with a bias, hidden states whose logits spread by a few units, and labels."""

    def __init__(self, shape, states, dtype=torch.float32, device="cpu", bias=True, **options):
        self.p: Problem = problem((*shape, 1), dtype, device, **options)
        V, H, _ = shape
        hidden = torch.randn(states, H, device=device)
        spread = F.linear(hidden.double(), self.rows(torch.float64)).std() if states else 1
        self.hidden = (3 * hidden.double() / spread).to(dtype)
        self.labels = torch.randint(V, (states,), device=device)
        self.bias = torch.randn(V, device=device).to(dtype) if bias else None
        self.upstream = torch.randn(states, device=device)

    def rows(self, dtype):
        ids = torch.arange(len(self.p.scales), device=self.p.scales.device)
        return self.p.plain(ids, *(each.to(dtype) for each in self.p.factors))

    @property
    def leaves(self):
        return [self.hidden, *self.p.factors, *([] if self.bias is None else [self.bias])]

    def ours(self, labels=None, **options):
        def function(hidden, *factors):
            given = iter(factors)
            floats = (self.p.scales, self.p.basis, self.p.offset, self.bias)
            *rest, bias = [each if each is None else next(given) for each in floats]
            chosen = self.labels if labels is None else labels
            return packed_cross_entropy(hidden, chosen, *self.p.codes, *rest, bias=bias, **options)

        return function

    def plain(self, labels=None, softcap=None, **options):
        ids = torch.arange(len(self.p.scales), device=self.p.scales.device)

        def function(hidden, *factors):
            factors = list(factors)
            bias = None if self.bias is None else factors.pop()
            logits = F.linear(hidden, self.p.plain(ids, *factors), bias)
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            chosen = self.labels if labels is None else labels
            return F.cross_entropy(logits, chosen.long(), **options)

        return function


def results(function, leaves, upstream, cast, trained=None):
    leaves = [each.detach().to(cast, copy=True) for each in leaves]
    for index, leaf in enumerate(leaves):
        leaf.requires_grad_(trained is None or index in trained)
    out = function(*leaves)
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)]


def assert_contract(shape, states, dtype, device="cpu", backend=None, trained=None, bias=True, **options):
    def draw():
        task = Task(shape, states, dtype, device, bias)
        if "ignore_index" in options:
            task.labels[::5] = options["ignore_index"]
        options["reduction"] = "none"
        arguments = (task.leaves, task.upstream)
        wanted = trained
        if trained is None and not options.get("softcap"):  # The exact gradient of the offset is 0.
            wanted = [i for i in range(len(task.leaves)) if i != len(task.p.factors)]
        ours = results(task.ours(backend=backend, **options), *arguments, dtype, wanted)
        assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        native = results(task.plain(**options), *arguments, dtype, wanted)
        return ours, native, results(task.plain(**options), *arguments, torch.float64, wanted)

    assert_no_worse_over_draws(draw)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_every_instruction_set_keeps_the_numerical_contract(level, dtype):
    assert cpu_capability() == level
    for shape in SHAPES[::2]:
        assert_contract(shape, 50, dtype)
        assert_contract(shape, 50, dtype, trained=[0], softcap=4.0)
    assert_contract(SHAPES[-1], 300, dtype, trained=[0])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_losses_and_gradients_are_no_worse_than_plain_torch(backend, device, options, dtype):
    for shape in SHAPES[1::2] if options else SHAPES:
        assert_contract(shape, 40, dtype, device, backend, **options)


@pytest.mark.parametrize("options", [{}, dict(softcap=3.0), dict(label_smoothing=0.1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_frozen_table_has_the_same_contract(backend, device, options, dtype):
    for states in (40, 300):  # more than are multiplied at a time
        assert_contract((301, 33, 32), states, dtype, device, backend, [0], bias=False, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("labels", [torch.int32, torch.int64], ids=str)
def test_reductions_and_dtypes_of_labels(backend, device, reduction, labels):
    task = Task((97, 33, 32), 12, device=device)
    task.labels = task.labels.to(labels)
    task.labels[::3] = -100
    upstream = task.upstream if reduction == "none" else task.upstream[0]
    got = results(task.ours(backend=backend, reduction=reduction), task.leaves, upstream, torch.float32)
    wide = results(task.plain(reduction=reduction), task.leaves, upstream, torch.float64)
    native = results(task.plain(reduction=reduction), task.leaves, upstream, torch.float32)
    for each, theirs, exact in zip(got, native, wide, strict=True):
        assert each.shape == exact.shape
        assert relative(each, exact) <= 4 * relative(theirs, exact) + 1e-6


def relative(got, exact):
    return float((got.double() - exact).norm() / exact.norm())


def test_ignored_states_leave_no_trace(backend, device):
    task = Task((97, 33, 32), 12, device=device)
    for trained in (None, [0]):
        kept = torch.arange(12, device=device) % 3 != 0
        some = task.labels.masked_fill(~kept, -100)
        task.hidden[0] = math.inf  # ignored, and must not spoil the others
        alone = Task.__new__(Task)
        alone.__dict__ = {**task.__dict__, "hidden": task.hidden[kept], "labels": task.labels[kept]}
        options = dict(backend=backend, reduction="sum")
        if backend != "native":
            task.hidden[0] = 0
        got = results(task.ours(some, **options), task.leaves, torch.ones(()), torch.float32, trained)
        expected = results(alone.ours(**options), alone.leaves, torch.ones(()), torch.float32, trained)
        assert_close(got[0], expected[0])
        assert torch.equal(got[1][~kept], torch.zeros_like(got[1][~kept]))
        assert_close(got[1][kept], expected[1], rtol=1e-4, atol=1e-6)
        assert_close(got[2:], expected[2:], rtol=1e-4, atol=1e-4)


def test_all_labels_ignored_and_empty_batches(backend, device):
    task = Task((40, 33, 32), 3, device=device)
    nothing = torch.full((3,), -100, device=device)
    for trained in (None, [0]):
        mean, *_ = results(
            task.ours(nothing, backend=backend), task.leaves, torch.ones(()), torch.float32, trained
        )
        assert mean.isnan()
        options = dict(backend=backend, reduction="sum")
        got = results(task.ours(nothing, **options), task.leaves, torch.ones(()), torch.float32, trained)
        assert all(float(each.abs().sum()) == 0 for each in got)
        empty = Task((40, 33, 32), 0, device=device)
        assert empty.ours(backend=backend)(*empty.leaves).isnan()
        got = results(empty.ours(**options), empty.leaves, torch.ones(()), torch.float32, trained)
        assert all(float(each.abs().sum()) == 0 for each in got)


def test_shapes(backend, device):
    task = Task((97, 33, 32), 6, device=device)
    hidden, labels = task.hidden.view(2, 3, 33), task.labels.view(2, 3)
    options = dict(backend=backend, reduction="none")
    flat = task.ours(**options)(*task.leaves)
    assert_close(task.ours(labels, **options)(hidden, *task.leaves[1:]), flat.view(2, 3))
    assert_close(task.ours(labels[0, 1], **options)(hidden[0, 1], *task.leaves[1:]), flat[1])
    apart = hidden.transpose(0, 2).contiguous().transpose(0, 2)
    leaf = apart.detach().requires_grad_()
    task.ours(labels, backend=backend)(leaf, *task.leaves[1:]).backward()
    assert leaf.grad.shape == hidden.shape
    assert_close(task.ours(labels, **options)(apart, *task.leaves[1:]), flat.view(2, 3))


@pytest.mark.parametrize("V", [1, 31, 33])
def test_tables_of_few_rows(backend, device, V):
    task = Task((V, 40, 32), 20, device=device)
    for options in ({}, dict(label_smoothing=0.3), dict(softcap=2.0)):
        for trained in (None, [0]):
            got = results(
                task.ours(backend=backend, **options), task.leaves, torch.ones(()), torch.float32, trained
            )
            exact = results(task.plain(**options), task.leaves, torch.ones(()), torch.float64, trained)
            for each, wanted in zip(got, exact, strict=True):
                assert_close(each.double(), wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()) + 1e-6)


@pytest.mark.parametrize("size", [1e4, 1e30])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignored_states_of_any_size_have_no_gradient(backend, device, smoothing, size):
    task = Task((97, 33, 32), 6, device=device, bias=False)
    hidden = (task.hidden * size).requires_grad_()
    options = dict(backend=backend, reduction="none", label_smoothing=smoothing)
    got = task.ours(torch.full_like(task.labels, -100), **options)(hidden, *task.p.factors)
    got.sum().backward()
    assert torch.equal(got, torch.zeros_like(got))
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("table_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_hidden_states_may_be_of_another_dtype(backend, device, dtype, table_dtype, smoothing):
    wide = torch.float64 in (dtype, table_dtype)
    plain = dict(reduction="none", label_smoothing=smoothing)

    def draw():
        task = Task((97, 97, 96), 5, table_dtype, device, bias=False)
        hidden = task.hidden.to(dtype).requires_grad_()
        got = task.ours(backend=backend, **plain)(hidden, *task.p.factors)
        assert got.dtype == (torch.float64 if wide else torch.float32)
        got.sum().backward()
        assert hidden.grad.dtype == dtype
        rows, states = task.rows(table_dtype).to(dtype), hidden.detach()
        native = F.cross_entropy(states @ rows.t(), task.labels, **plain)
        exact = F.cross_entropy(states.double() @ task.rows(torch.float64).t(), task.labels, **plain)
        return [got.detach()], [native], [exact]

    assert_no_worse_over_draws(draw)


def certain(device, gap):
    """Logits 0 and -gap of two rows, for both labels in turn."""
    task = Task((2, 32, 0), 2, device=device, bias=True, offset=False)
    task.hidden = torch.zeros(2, 32, device=device)
    task.bias = torch.tensor([0.0, -gap], device=device)
    task.labels = torch.tensor([0, 1], device=device)
    return task


@pytest.mark.parametrize("gap", [1.0, 15.0, 40.0, 80.0, 200.0, 3e4])
@pytest.mark.usefixtures("poisoned")
def test_a_certain_prediction_has_an_exact_loss_and_gradient(backend, device, gap):
    """exp(-gap) is lost beside 1 in fp32 from 16 on; the loss and the gradient of bias must not lose it."""
    task = certain(device, gap)
    for trained in (None, [0], [2]):
        got = results(
            task.ours(backend=backend, reduction="none"), task.leaves, torch.ones(2), torch.float32, trained
        )
        exact = torch.tensor([math.log1p(math.exp(-gap)), gap + math.log1p(math.exp(-gap))])
        assert_close(got[0].cpu(), exact, rtol=1e-5, atol=1e-37)
        if trained == [2]:
            p = math.exp(-gap) / (1 + math.exp(-gap))
            task_alone = results(
                lambda hidden, *rest: task.ours(backend=backend, reduction="none")(hidden, *rest)[:1],
                task.leaves, torch.ones(1), torch.float32, trained,
            )  # fmt: skip
            assert_close(task_alone[1].cpu(), torch.tensor([-p, p]), rtol=1e-5, atol=1e-37)


def test_infinite_and_missing_logits(backend, device):
    task = Task((70, 33, 0), 5, device=device)
    task.labels = torch.arange(5, device=device)
    task.bias[40:] = -math.inf  # masked rows
    for trained in (None, [0]):
        options = dict(backend=backend, reduction="none")
        got = results(task.ours(**options), task.leaves, task.upstream, torch.float32, trained)
        exact = results(task.plain(reduction="none"), task.leaves, task.upstream, torch.float64, trained)
        for each, wanted in zip(got, exact, strict=True):  # The exact gradient of offset is 0.
            assert_close(each.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()) + 1e-6)
    impossible = torch.full((5,), 50, device=device)
    assert bool((task.ours(impossible, **options)(*task.leaves) == math.inf).all())
    for value in (-math.inf, math.inf, math.nan):
        task.bias.fill_(value)
        got, expected = task.ours(**options)(*task.leaves), task.plain(reduction="none")(*task.leaves)
        assert torch.equal(got.isnan(), expected.isnan())


def test_only_what_is_needed_has_a_gradient(backend, device):
    task = Task((40, 33, 32), 40, device=device)
    expected = results(task.plain(softcap=3.0), task.leaves, torch.ones(()), torch.float64)[1:]
    function = task.ours(softcap=3.0, backend=backend)
    for index in range(5):
        _, got = results(function, task.leaves, torch.ones(()), torch.float32, [index])
        assert_close(got.double(), expected[index], rtol=1e-4, atol=1e-5 * float(expected[index].abs().max()))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_gradients_of_the_definition(native, options):
    tiers = [Tier(False, (3,)), Tier(True, (4,))]
    task = Task((40, 5, 32), 4, torch.float64, tiers=tiers)
    if "ignore_index" in options:
        task.labels[1] = options["ignore_index"]
    for backend in ("torch", native):
        for count in (1, 5):
            leaves = [each.detach().requires_grad_(i < count) for i, each in enumerate(task.leaves)]
            function = task.ours(backend=backend, reduction="none", **options)
            assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("states", [1, 8, 300])
def test_the_bits_do_not_depend_on_threads(native, states):
    task = Task((1100, 160, 128), states)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append([])
            for trained in (None, [0]):
                options = dict(backend=native, softcap=3.0)
                found[-1] += results(
                    task.ours(**options), task.leaves, torch.ones(()), torch.float32, trained
                )
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.usefixtures("level")
def test_exp_and_tanh_of_the_kernels():
    exp_and_tanh = torch.ops.embkern.exp_and_tanh
    values = torch.cat([
        torch.linspace(-110, 90, 200_001), torch.linspace(-1, 1, 100_001), torch.randn(10_001) * 1e-3,
        torch.tensor([0.0, -0.0, 1e-45, -1e-30, -1e30, 1e30, -3.4e38, 88.7, 88.8, -103.9, -104.1]),
    ])  # fmt: skip
    exponentials, tangents = exp_and_tanh(values)
    for got, exact, ulp in ((exponentials, values.double().exp(), 1), (tangents, values.double().tanh(), 2)):
        size = exact.to(torch.float32).abs()
        spacing = torch.nextafter(size, torch.full_like(size, math.inf)).double() - size.double()
        finite = exact.abs() < 3.4e38
        wrong = ((got.double() - exact).abs() > ulp * spacing) & finite
        assert not wrong.any(), f"{values[wrong][:5]}: {got[wrong][:5]}, not {exact[wrong][:5]}"
        assert torch.equal(got[~finite], exact[~finite].float())
    special = torch.tensor([-math.inf, math.inf, math.nan])
    exponentials, tangents = exp_and_tanh(special)
    assert exponentials[:2].tolist() == [0, math.inf]
    assert tangents[:2].tolist() == [-1, 1]
    assert exponentials[2].isnan()
    assert tangents[2].isnan()
    wide = values.double()
    assert_close(exp_and_tanh(wide)[0], wide.exp())
    assert_close(exp_and_tanh(wide)[1], wide.tanh())


def test_a_damaged_directory_is_refused_and_never_followed(native):
    task = Task((100, 33, 32), 20, bias=False)
    records, directory, tiers, levels = task.p.codes
    rest = (tiers, levels, *task.p.factors)
    for place, value in (((1, 0), len(records)), ((0, 0), -1), ((2, 0), 2**31 - 1), ((0, 1), -1)):
        damaged = directory.clone()
        damaged[place] = value
        for trained in (False, True):
            with pytest.raises(ValueError, match="directory: expected records within"):
                packed_cross_entropy(
                    task.hidden.detach().requires_grad_(trained), task.labels, records, damaged, *rest,
                    backend=native,
                )  # fmt: skip
        with pytest.raises(ValueError, match="directory: expected records within"):
            torch.ops.embkern.packed_cross_entropy_backward.native(
                task.upstream, torch.zeros(20, 3), task.hidden, task.labels, records, damaged, *rest, None,
                -100, 0.0, 0.0, True, True, True, True, False,
            )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(labels=torch.tensor([1, 40, 2])), IndexError,
         "labels: expected 0 <= label < 40 or -100, got 40 at flat position 1"),
        (dict(labels=torch.tensor([1, 2, -1])), IndexError, "labels: expected .* got -1 at flat position 2"),
        (dict(labels=torch.ones(2).long()), ValueError, "labels: expected"),
        (dict(labels=torch.ones(3, 1).long()), ValueError, r"labels: expected shape \(3,\)"),
        (dict(labels=torch.ones(3)), TypeError, "labels: expected dtype"),
        (dict(hidden=torch.ones(3, 32)), ValueError, "basis: expected"),
        (dict(hidden=torch.ones(3, 33).long()), TypeError, "hidden: expected a floating-point dtype"),
        (dict(hidden=torch.ones(())), ValueError, "hidden: expected shape|basis: expected"),
        (dict(hidden=torch.ones(3, 33, device="meta")), ValueError, "hidden: expected device cpu"),
        (dict(bias=torch.ones(39)), ValueError, "bias: expected"),
        (dict(bias=torch.ones(40).long()), TypeError, "bias: expected a floating-point dtype"),
        (dict(offset=torch.ones(33).double()), TypeError, "offset: expected dtype"),
        (dict(label_smoothing=1.5), ValueError, "label_smoothing: expected 0 to 1, got 1.5"),
        (dict(softcap=0.0), ValueError, "softcap: expected a positive number or None, got 0.0"),
        (dict(softcap=math.nan), ValueError, "softcap: expected a positive number or None, got nan"),
        (dict(reduction="max"), ValueError, "reduction: expected one of mean, sum, none, got 'max'"),
        (dict(backend="mine"), ValueError, "backend: expected one of"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(backend, device, change, error, message):
    task = Task((40, 33, 32), 3, device=device)
    names = ("records", "directory", "tiers", "levels", "scales", "basis", "offset")
    arguments = {
        "hidden": torch.ones(3, 33),
        "labels": torch.tensor([1, 39, 2]),
        **dict(zip(names, (*task.p.codes, *task.p.factors), strict=True)),
        "bias": torch.ones(40),
        "backend": backend,
        **change,
    }
    if device == "cuda":
        if error is IndexError:
            pytest.skip("a device assertion ends the process")
        arguments = {
            name: each.to(device) if isinstance(each, torch.Tensor) and not each.is_meta else each
            for name, each in arguments.items()
        }
    with pytest.raises(error, match=message) as caught:
        packed_cross_entropy(**arguments)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("op", ["packed_cross_entropy_forward", "packed_cross_entropy_backward"])
@pytest.mark.parametrize("whole", [False, True])
def test_opcheck(native, op, whole):
    task = Task((40, 33, 32), 6, bias=whole)
    packed = (*task.p.codes, *task.p.factors, task.bias)
    arguments = (task.hidden, task.labels, *packed, -100, 0.0, 0.0)
    if op.endswith("forward"):
        arguments = (*arguments, whole)
    else:
        statistics = torch.ops.embkern.packed_cross_entropy_forward.native(*arguments, False)[1]
        arguments = (task.upstream, statistics, *arguments, True, whole, True, True, whole)
    torch.library.opcheck(getattr(torch.ops.embkern, op).native, arguments)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_compiles_to_one_node(native, smoothing):
    task = Task((41, 33, 32), 3)
    function = lambda hidden, labels: packed_cross_entropy(  # noqa: E731
        hidden, labels, *task.p.codes, *task.p.factors, label_smoothing=smoothing
    )
    compiled, graphs = compile_counting(function)
    for states in (6, 7, 20):  # no other tensor has a size of 6, which would be taken for the same
        hidden = torch.randn(states, 33, requires_grad=True)
        labels = torch.randint(41, (states,))
        got, expected = compiled(hidden, labels), function(hidden, labels)
        assert_close(got, expected)
        assert_close(torch.autograd.grad(got, hidden), torch.autograd.grad(expected, hidden))
    assert len(graphs) == 2
    calls = [node for node in graphs[0].graph.nodes if "packed_cross_entropy" in str(node.target)]
    assert len(calls) == 1


def test_the_definition_never_holds_the_table(monkeypatch):
    monkeypatch.setattr("embkern.ops.reference.cross_entropy.FEWEST_ROWS", 32)
    monkeypatch.setattr("embkern.ops.reference.cross_entropy.MOST_LOGITS", 1)
    task, held = Task((97, 33, 32), 3), []

    def watched(ids, *arguments):
        held.append(len(ids))
        return reference.gather_decode_forward(ids, *arguments)

    arguments = (task.hidden, task.labels, *task.p.codes, *task.p.factors, task.bias, -100, 0.0, 3.0)
    losses, statistics, _ = reference.packed_cross_entropy_forward(*arguments, True, decode=watched)
    options = dict(softcap=3.0, reduction="none")
    expected = results(task.plain(**options), task.leaves, task.upstream, torch.float32)
    assert_close(losses, expected[0])
    grads = reference.packed_cross_entropy_backward(
        task.upstream, statistics, *arguments, *[True] * 5, decode=watched
    )
    for each, wanted in zip(grads, expected[1:], strict=True):
        assert_close(each, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert set(held) == {32, 1}


def test_a_second_derivative_and_forward_mode_are_refused(backend, device):
    task = Task((40, 33, 32), 2, device=device)
    for trained in ([0], [0, 1]):
        leaves = [each.detach().requires_grad_(i in trained) for i, each in enumerate(task.leaves)]
        loss = task.ours(backend=backend)(*leaves)
        (grad,) = torch.autograd.grad(loss.square(), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(grad.sum(), leaves[0])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(task.hidden, torch.ones_like(task.hidden))
        with pytest.raises((RuntimeError, NotImplementedError), match="jvp|forward"):
            task.ours(backend=backend)(dual, *task.leaves[1:])


def test_autocast_casts_hidden_as_linear_does(backend, device):
    task = Task((97, 33, 32), 9, device=device)
    options = dict(backend=backend, reduction="none")
    with torch.autocast(device, dtype=torch.bfloat16):
        got = task.ours(**options)(*task.leaves)
    assert got.dtype == torch.float32
    assert_close(got, task.ours(**options)(task.hidden.bfloat16(), *task.leaves[1:]))

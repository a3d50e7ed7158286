"""The Triton kernels of the cross-entropies, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from embkern.ops import low_rank_cross_entropy, reference
from embkern.triton.cross_entropy.gradients import is_fused
from embkern.triton.launch import Launch
from embkern.triton.tiles import LOSS_TILES, LossTile
from tests.ops import test_low_rank_cross_entropy as low_rank
from tests.ops import test_packed_cross_entropy as packed
from tests.ops.test_packed_cross_entropy import OPTIONS, results

DTYPES = [torch.float32, torch.float16, torch.float64]
BACKEND = dict(backend="triton")


@pytest.fixture(autouse=True)
def decoded(monkeypatch):
    """Decode with the definition: the kernels of gather_decode have tests of their own."""
    monkeypatch.setattr(
        "embkern.triton.packed_cross_entropy.gather_decode_forward", reference.gather_decode_forward
    )


@pytest.fixture
def pieces(monkeypatch):
    """Few rows in a piece of the table, and in a program."""
    monkeypatch.setattr("embkern.ops.reference.cross_entropy.FEWEST_ROWS", 64)
    monkeypatch.setattr("embkern.ops.reference.cross_entropy.MOST_LOGITS", 1)
    monkeypatch.setattr("embkern.triton.packed_cross_entropy.PIECE_ROWS", 160)
    for kernel in ("fold", "state_gradient", "row_gradient"):
        monkeypatch.setitem(LOSS_TILES, (kernel, 2), LossTile(32, 32, 256, 4, 2))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_factors_are_no_worse_than_plain_torch(dtype, options):
    low_rank.assert_contract((97, 33, 33), 40, dtype, "cpu", "triton", range(5), **options)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_packed_tables_are_no_worse_than_plain_torch(dtype, options):
    packed.assert_contract((97, 33, 32), 40, dtype, "cpu", "triton", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("poisoned", "pieces")
def test_parts_of_the_table_are_added_up(dtype):
    low_rank.assert_contract((301, 48, 20), 40, dtype, "cpu", "triton", range(5), **OPTIONS[3])
    packed.assert_contract((301, 70, 32), 40, dtype, "cpu", "triton", **OPTIONS[3])


@pytest.mark.parametrize("trained", [(0,), (1,), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_only_what_is_needed_has_a_gradient(dtype, trained):
    task = low_rank.Task((97, 33, 20), 40, dtype)
    ours = task.ours(softcap=3.0, **BACKEND)
    everything = results(ours, task.leaves, torch.ones(()), dtype)[1:]
    got = results(ours, task.leaves, torch.ones(()), dtype, trained)[1:]
    assert_close(got, [everything[i] for i in trained], rtol=0, atol=0)


# More columns than are loaded once or multiplied in registers; one state; as many as fill two blocks.
@pytest.mark.parametrize(("shape", "states"), [((70, 300, 290), 5), ((33, 24, 16), 1), ((40, 24, 16), 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_wide_and_few_states(shape, states, dtype):
    low_rank.assert_contract(shape, states, dtype, "cpu", "triton", range(5), label_smoothing=0.1)


@pytest.mark.usefixtures("poisoned")
def test_the_raw_op_has_the_gradient_of_hidden_with_the_losses():
    task = packed.Task((97, 33, 32), 12)
    task.labels[::3] = -100
    arguments = (task.hidden, task.labels, *task.p.codes, *task.p.factors, task.bias, -100, 0.0, 3.0, True)
    forward = torch.ops.embkern.packed_cross_entropy_forward
    for got, wanted in zip(forward.triton(*arguments), forward.torch(*arguments), strict=True):
        assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_labels_reductions_and_empty_batches():
    for trained in (range(5), (0,)):
        low_rank.test_ignored_labels_empty_batches_and_reductions("cpu", "triton", trained)
    packed.test_ignored_states_leave_no_trace("triton", "cpu")
    packed.test_all_labels_ignored_and_empty_batches("triton", "cpu")
    packed.test_shapes("triton", "cpu")
    for V in (1, 31, 33):
        packed.test_tables_of_few_rows("triton", "cpu", V)


@pytest.mark.parametrize("size", [1e4, 1e30])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignored_states_of_any_size_have_no_gradient(smoothing, size):
    packed.test_ignored_states_of_any_size_have_no_gradient("triton", "cpu", smoothing, size)


@pytest.mark.parametrize(
    ("dtype", "table_dtype"),
    [
        (torch.float16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_hidden_states_may_be_of_another_dtype(dtype, table_dtype):
    packed.test_hidden_states_may_be_of_another_dtype("triton", "cpu", dtype, table_dtype, 0.1)


@pytest.mark.parametrize("gap", [1.0, 15.0, 40.0, 80.0, 200.0, 3e4])
@pytest.mark.usefixtures("poisoned")
def test_a_certain_prediction_has_an_exact_loss_and_gradient(gap):
    packed.test_a_certain_prediction_has_an_exact_loss_and_gradient("triton", "cpu", gap)


def test_infinite_and_missing_logits():
    packed.test_infinite_and_missing_logits("triton", "cpu")


def test_hyperbolic_tangent_of_small_and_large_logits():
    """A logit as small as 1e-4 of the cap keeps its digits, and one of 1e4 times the cap its slope of 0."""
    z = torch.tensor([1e-4, -1e-2, 0.3, -0.59, 0.61, 2.0, -20.0, 1e4, -math.inf])
    codes, hidden = torch.zeros(len(z), 1), torch.zeros(len(z), 1)
    labels, cap = torch.arange(len(z)), 30.0
    options = dict(bias=cap * z, softcap=cap, reduction="none")
    got = low_rank_cross_entropy(hidden, labels, codes, torch.zeros(1, 1), **options, **BACKEND)
    logits = cap * torch.tanh(z.double())
    exact = logits.logsumexp(0) - logits
    assert_close(got.double(), exact, rtol=1e-7, atol=1e-6)


def test_the_same_bits_twice():
    task = low_rank.Task((301, 48, 20), 40, torch.float16)
    first, second = (
        results(task.ours(reduction="none", **BACKEND), task.leaves, task.upstream, torch.float16)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_states_launch_nothing(monkeypatch):
    monkeypatch.setattr(Launch, "run", lambda self: pytest.fail("launched"))
    task = low_rank.Task((40, 7, 4), 0)
    assert task.ours(reduction="none", **BACKEND)(*task.leaves).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_no_more_than_a_piece_of_the_logits_is_in_memory(monkeypatch, dtype):
    """Fused gradients hold none; others no more than ``pieces`` allows."""
    monkeypatch.setattr("embkern.ops.reference.cross_entropy.FEWEST_ROWS", 64)
    monkeypatch.setattr("embkern.ops.reference.cross_entropy.MOST_LOGITS", 1)
    largest = []
    launch = Launch.run

    def watched(self):
        outputs = [
            self.arguments[name] for name in ("out_ptr", "maxima_ptr", "sums_ptr") if name in self.arguments
        ]
        largest.extend(each.numel() for each in outputs)
        launch(self)

    monkeypatch.setattr(Launch, "run", watched)
    task = low_rank.Task((640, 24, 4), 40, dtype)
    results(task.ours(**BACKEND), task.leaves, torch.ones(()), dtype)
    assert max(largest) <= 64 * 40 < 640 * 40


def test_fused_gradients_take_narrow_states_of_16_bits():
    assert is_fused(torch.empty(3, 256, dtype=torch.bfloat16))
    assert not is_fused(torch.empty(3, 257, dtype=torch.bfloat16))
    assert not is_fused(torch.empty(3, 16))


def test_the_ops_have_the_schemas_they_declare():
    utils = dict(test_utils=("test_schema", "test_faketensor"))
    task = low_rank.Task((40, 7, 4), 6)
    arguments = (task.hidden, task.labels, task.codes, task.basis, task.offset, task.bias, -100, 0.1, 3.0)
    ops = torch.ops.embkern
    torch.library.opcheck(ops.low_rank_cross_entropy_forward.triton, arguments, **utils)
    statistics = ops.low_rank_cross_entropy_forward.triton(*arguments)[1]
    for needs in ((True, True), (False, False)):
        torch.library.opcheck(
            ops.low_rank_cross_entropy_backward.triton,
            (task.upstream, statistics, *arguments, *needs),
            **utils,
        )
    table = packed.Task((40, 33, 32), 6)
    arguments = (table.hidden, table.labels, *table.p.codes, *table.p.factors, table.bias, -100, 0.1, 0.0)
    torch.library.opcheck(ops.packed_cross_entropy_forward.triton, (*arguments, False), **utils)
    given = (table.upstream, statistics, *arguments, True, True, True, True, True)
    torch.library.opcheck(ops.packed_cross_entropy_backward.triton, given, **utils)

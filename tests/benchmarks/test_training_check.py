"""The check of training loops: every loop passes it, and wrong steps do not."""

import pytest

from benchmarks import training_check, training_loops
from benchmarks.losses import TERMS
from benchmarks.training_loops import TABLES

pytestmark = pytest.mark.slow


TINY_TABLE = TABLES["tiny"]


@pytest.mark.parametrize("batch_size", [32, TINY_TABLE.V])
@pytest.mark.parametrize("terms", TERMS)
def test_every_loop_is_right(tiny_rows, terms, batch_size):
    check = training_check.Check(tiny_rows, TINY_TABLE, TERMS[terms], batch_size)
    for provider in training_loops.PROVIDERS.values():
        if provider.compiled or provider.reason("cpu"):
            continue
        check(provider.build(tiny_rows, TINY_TABLE, TERMS[terms], batch_size))


def test_the_loop_check_refuses_what_is_wrong(tiny_rows):
    terms = TERMS["cosine+power"]
    check = training_check.Check(tiny_rows, TINY_TABLE, terms, 32)

    def loop():
        return training_loops.PlainLoop(tiny_rows, TINY_TABLE, terms, 32)

    class Wrong:
        def __init__(self, right, change):
            self.right, self.change, self.weights = right, change, right.weights

        def run(self, order, alpha, lr):
            return self.right.run(*self.change(order, alpha, lr))

    check(Wrong(loop(), lambda *given: given))
    for wrong in (
        lambda order, alpha, lr: (order, alpha, 1.02 * lr),
        lambda order, alpha, lr: (order, alpha + 0.1, lr),
        lambda order, alpha, lr: (order.roll(1), alpha, lr),
    ):
        with pytest.raises(AssertionError, match="relative error"):
            check(Wrong(loop(), wrong))
    frozen = loop()
    for group in frozen.optimizer.param_groups:  # the last weights are not trained
        group["params"] = group["params"][:-1]
    with pytest.raises(AssertionError, match="relative error"):
        check(frozen)


def test_ids_of_steps_are_whole_batches_without_repeats_in_a_pass():
    ids = training_check.ids_of_steps(100, 32, 7, seed=0)
    assert len(ids) == 7 * 32
    assert all(len(part.unique()) == 96 for part in ids.split(96)[:2])
    assert training_check.ids_of_steps(5, 5, 2, seed=0).tolist() == [*range(5), *range(5)]

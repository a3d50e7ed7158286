"""The losses that are compared, and their check."""

import itertools

import pytest
import torch

from benchmarks import losses
from benchmarks.cosine_mse import MODES
from benchmarks.losses import TERMS
from benchmarks.peers import BOTH

pytestmark = pytest.mark.slow


def test_every_loss_is_right_in_every_dtype():
    for dtype, (terms_name, terms) in itertools.product((torch.float32, torch.bfloat16), TERMS.items()):
        batch = losses.Batch.random(33, 96, dtype, "cpu")
        check = losses.Check(batch, BOTH, terms)
        for name, provider in losses.PROVIDERS.items():
            if name in losses.COMPILED or provider.reason("cpu", dtype):
                continue
            error = check(provider.build(terms), provider.rival)
            assert error < (1e-5 if dtype == torch.float32 else 0.02), (name, dtype, terms_name)


@pytest.mark.parametrize("terms", TERMS)
def test_the_loss_check_refuses_what_is_wrong(terms):
    right = losses.PROVIDERS["three-dot"].build(TERMS[terms])
    for mode in MODES:
        batch = losses.Batch.random(33, 96, torch.float32, "cpu")
        check = losses.Check(batch, mode, TERMS[terms])
        check(right)
        with pytest.raises(AssertionError, match="relative error"):
            check(lambda batch: right(batch) * 1.0001)
    with pytest.raises(AssertionError, match="relative error"):  # the right value and half of its gradient
        check(lambda batch: (right(batch) + right(batch).detach()) / 2)


def test_the_loss_in_fp16_has_a_gradient():
    batch = losses.Batch.random(4096, 384, torch.float16, "cpu")
    loss = losses.PROVIDERS["three-dot"].build(TERMS["cosine+mse"])
    (grad,) = losses.mode_call(BOTH, loss, batch)()
    assert (grad == 0).float().mean() < 0.01, "without the loss scale half of it vanishes"

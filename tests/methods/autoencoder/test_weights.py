"""``Weights``: their initialisation, and both directions of the autoencoder."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from embkern.methods.autoencoder.weights import Weights
from tests.conftest import seed_of
from tests.methods.autoencoder.losses import weights_of


def test_the_weights_start_like_nn_linear():
    torch.manual_seed(seed_of(3))
    weights = Weights.random(4, 10)
    torch.manual_seed(seed_of(3))
    encoder, decoder = nn.Linear(10, 4), nn.Linear(4, 10)
    expected = (encoder.weight, encoder.bias, decoder.weight.t(), decoder.bias)
    assert all(torch.equal(part, e) for part, e in zip(weights.parts(), expected, strict=True))


@pytest.mark.parametrize("activation", [None, "elu"])
def test_encode_and_decode(activation):
    weights, rows = weights_of(4, 10, activation), torch.randn(7, 10)
    encoder_weight, encoder_bias, basis, offset = weights.parts()
    bend = F.elu if activation else nn.Identity()
    codes = bend(rows @ encoder_weight.t() + encoder_bias)
    assert_close(weights.encode(rows), codes)
    assert_close(weights.decode(codes), bend(codes @ basis + offset))

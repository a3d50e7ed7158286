"""``AutoencoderOptions``: the authors' defaults and schedules."""

from __future__ import annotations

import pytest
import torch

from embkern.methods.autoencoder import AutoencoderOptions


def test_the_defaults_are_the_authors_recipe():
    options = AutoencoderOptions()
    assert options.cosine_weight == pytest.approx(0.1995)
    assert (options.power_weight, options.rmse_weight, options.mse_weight) == (0.0025, 0.0, 0.0)
    assert (options.lr, options.batch_size, options.epochs, options.seed, options.eps) == (
        1e-3,
        32,
        30,
        1,
        1e-6,
    )
    assert [options.alpha(epoch) for epoch in (0, 10, 20, 29)] == pytest.approx([1.0, 0.55, 0.1, 0.1])
    assert [options.learning_rate(epoch) for epoch in (0, 3, 4, 29)] == [1e-3, 1e-3, 5e-4, 1e-3 * 0.5**7]


def test_the_learning_rate_is_that_of_step_lr():
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], 0.3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7)
    options = AutoencoderOptions(lr=0.3, lr_step=3, lr_gamma=0.7)
    for epoch in range(10):
        assert options.learning_rate(epoch) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()

"""autoencoder_train: steps of Adam against torch's, determinism, memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from embkern.ops import library
from tests.ops.autoencoder_problems import composed


def train(rows, order, batch_size, parameters, steps_before, rank, level=None, lr=1e-2):
    moments = [torch.zeros_like(parameters) for _ in range(2)]
    losses = torch.ops.embkern.autoencoder_train.native(
        rows, order, batch_size, parameters, *moments, rank, steps_before, lr, 0.9, 0.999, 1e-8,
        0.2, 0.1, 0.05, 0.01, 0.8, 1e-6,
    )  # fmt: skip
    return [losses, parameters, *moments]


@pytest.mark.parametrize(("batch_size", "count"), [(32, 400), (1024, 1024), (600, 1000)])
def test_training_steps_are_torch_adam_on_the_loss(native, batch_size, count):
    H, r = 48, 13
    rows = torch.randn(1024, H, dtype=torch.float64)
    order = torch.randperm(len(rows))[:count]
    start = 0.1 * torch.randn(2 * r * H + r + H, dtype=torch.float64)
    got = train(rows, order, batch_size, start.clone(), 0, r)

    flat = start.clone().requires_grad_()
    optimizer, expected = torch.optim.Adam([flat], lr=1e-2), []
    for ids in order.split(batch_size):
        weight, bias, basis, offset = flat.split((r * H, r, r * H, H))
        loss = composed(
            rows[ids], basis.view(r, H), offset, encoder_weight=weight.view(r, H), encoder_bias=bias,
            cosine_weight=0.2, mse_weight=0.1, rmse_weight=0.05, power_weight=0.01, alpha=0.8, eps=1e-6,
        )  # fmt: skip
        expected.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = optimizer.state[flat]
    for ours, theirs in zip(
        got, [torch.stack(expected), flat.detach(), state["exp_avg"], state["exp_avg_sq"]], strict=True
    ):
        assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("batch_size", [32, 700])
def test_training_is_deterministic_for_any_number_of_threads(native, batch_size):
    rows, start = torch.randn(1400, 96), 0.1 * torch.randn(2 * 40 * 96 + 40 + 96)
    order = torch.randperm(1400)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(train(rows, order, batch_size, start.clone(), 0, 40))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_every_instruction_set_trains_alike(native):
    before, results = library.cpu_capability(), []
    rows, start = torch.randn(300, 50), 0.1 * torch.randn(2 * 9 * 50 + 9 + 50)
    try:
        for level in library.CPU_CAPABILITIES[: library.CPU_CAPABILITIES.index(before) + 1]:
            library.cpu_capability(level)
            results.append(train(rows, torch.arange(300), 32, start.clone(), 5, 9))
    finally:
        library.cpu_capability(before)
    for other in results[1:]:
        for ours, first in zip(other[:2], results[0][:2], strict=True):
            assert_close(ours, first, rtol=1e-5, atol=2e-5)  # 0.2 % of one of the ten steps


def test_training_refuses_an_id_out_of_range_untouched(native):
    rows, start = torch.randn(10, 8), torch.randn(2 * 3 * 8 + 3 + 8)
    parameters = start.clone()
    with pytest.raises(IndexError, match="order: expected 0 <= id < 10, got 10 at position 1"):
        train(rows, torch.tensor([0, 10]), 2, parameters, 0, 3)
    assert torch.equal(parameters, start)


def test_another_thread_that_writes_the_order_makes_no_read_beyond_the_rows(native):
    """The ids of all steps are read once and checked before the first step."""
    script = """
import threading, time, torch
from embkern.ops.library import load_native
assert load_native() is None
rows, order, done = torch.randn(64, 8), torch.arange(6400) % 64, False
def write():
    while not done:
        order[-1:].fill_(2**40)
        order[-1:].fill_(63)
writer = threading.Thread(target=write)
writer.start()
trained, end = 0, time.monotonic() + 1
while time.monotonic() < end:
    state = [torch.zeros(2 * 3 * 8 + 3 + 8) for _ in range(3)]
    try:
        torch.ops.embkern.autoencoder_train.native(
            rows, order, 16, *state, 3, 0, 1e-3, 0.9, 0.999, 1e-8, 1.0, 1.0, 0.0, 0.0, 1.0, 1e-8
        )
        trained += 1
    except IndexError as error:
        assert "order: expected 0 <= id < 64" in str(error)
done = True
writer.join()
assert trained > 0
print("read nothing beyond")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.strip() == "read nothing beyond", f"exit code {run.returncode}\n{run.stderr}"

"""The paper's autoencoder: its loss, its schedule, its resume, its selection."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch.testing import assert_close

from embkern.io.tensor_format import TensorFormat
from embkern.methods import autoencoder, svd
from embkern.methods.autoencoder import AutoencoderOptions
from embkern.methods.autoencoder.checkpoint import FORMAT

QUICK = dict(epochs=3, batch_size=16, progress=False)


@pytest.fixture
def table() -> torch.Tensor:
    return torch.randn(120, 6) @ torch.randn(6, 10)


def same(left, right) -> bool:
    return all(torch.equal(a, right.tensors()[name]) for name, a in left.tensors().items())


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


@pytest.mark.parametrize("activation", [None, "elu"])
def test_training_lowers_the_direction_error(table, activation):
    def error(factors):
        return float((1 - F.cosine_similarity(table, factors.to_dense())).mean())

    short = autoencoder(table, 3, **QUICK | dict(epochs=1), activation=activation)
    long = autoencoder(table, 3, **QUICK | dict(epochs=40, lr_step=20, lr=5e-3), activation=activation)
    assert error(long) < 0.6 * error(short)
    assert long.activation == activation
    if activation is None:  # never far from the best linear map, which it approaches from its own init
        assert error(long) < error(svd(table, 3)) + 0.05


def test_svd_initialisation_starts_at_the_svd(table):
    start = autoencoder(table, 3, **QUICK | dict(epochs=1), init="svd", lr=1e-12)
    assert_close(start.to_dense(), svd(table, 3).to_dense(), atol=1e-4, rtol=1e-4)


def test_the_same_seed_gives_the_same_bits_and_the_global_generator_is_left_alone(table):
    state = torch.get_rng_state()
    first, second = (autoencoder(table, 3, **QUICK) for _ in range(2))
    assert same(first, second)
    assert not same(first, autoencoder(table, 3, **QUICK, seed=2))
    assert torch.equal(torch.get_rng_state(), state)


def test_other_devices_are_not_reseeded(table, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("reseeded every GPU"))
    autoencoder(table, 3, **QUICK, init="svd")
    svd(table, 3, algorithm="randomized")


def test_the_callers_modes_do_not_matter(table):
    expected = autoencoder(table, 3, **QUICK)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert same(autoencoder(table, 3, **QUICK), expected)
    with torch.device("meta"):
        assert same(autoencoder(table, 3, **QUICK), expected)
    with torch.inference_mode():
        assert same(autoencoder(table.clone(), 3, **QUICK), expected)


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_named(table, score):
    with pytest.raises(ValueError, match="validate: expected a finite score in epoch 0"):
        autoencoder(table, 3, **QUICK, validate=lambda factors: score)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_dtype_of_the_table_is_kept(table, dtype):
    factors = autoencoder(table.to(dtype), 3, **QUICK)
    assert {tensor.dtype for tensor in factors.tensors().values()} == {dtype}


def test_the_log_has_a_line_per_epoch(table, tmp_path):
    autoencoder(table, 3, **QUICK, log=tmp_path / "log.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert {"loss", "direction_error", "rmse", "alpha", "lr", "score", "seconds"} <= lines[0].keys()
    assert lines[2]["direction_error"] < lines[0]["direction_error"]


def test_the_best_epoch_by_the_callers_score_is_kept(table):
    seen = []

    def prefer_the_second(factors):
        seen.append(factors)
        return 0.0 if len(seen) == 2 else 1.0

    assert same(autoencoder(table, 3, **QUICK, validate=prefer_the_second), seen[1])
    assert len(seen) == 3


def test_resume_after_any_epoch_ends_with_the_same_weights(table, tmp_path):
    whole = autoencoder(table, 3, **QUICK, log=tmp_path / "whole.jsonl")
    for stop in (1, 2):
        path = tmp_path / f"{stop}.pt"

        def stop_at(factors, calls=[], stop=stop):  # noqa: B006
            calls.append(1)
            if len(calls) > stop:
                raise InterruptedError
            return float((1 - F.cosine_similarity(table, factors.to_dense())).mean())

        with pytest.raises(InterruptedError):
            autoencoder(table, 3, **QUICK, checkpoint=path, checkpoint_seconds=0, validate=stop_at)
        resumed = autoencoder(table, 3, **QUICK, checkpoint=path, log=tmp_path / "resumed.jsonl")
        assert same(resumed, whole)
        assert len((tmp_path / "resumed.jsonl").read_text().splitlines()) == 3


def epoch_of(path):
    with safe_open(path, "pt") as file:
        return int(file.metadata()["epoch"])


@pytest.mark.slow
def test_resume_after_kills_at_any_step_ends_with_the_same_weights(tmp_path):
    table = torch.randn(400, 6) @ torch.randn(6, 10)
    torch.save(table, tmp_path / "table.pt")
    path, options = tmp_path / "c.pt", dict(batch_size=4, progress=False, checkpoint_seconds=0)
    script = (
        "import sys, torch; from embkern.methods import autoencoder\n"
        "table = torch.load(sys.argv[1] + '/table.pt')\n"
        f"autoencoder(table, 3, checkpoint=sys.argv[1] + '/c.pt', epochs=10**6, **{options})\n"
    )

    def mark():
        return os.stat(path).st_mtime_ns if path.exists() else None

    done = 0
    for _ in range(2):
        before, deadline = mark(), time.monotonic() + 60
        process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
        while mark() == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1 * random.random())
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert epoch_of(path) > done
        done = epoch_of(path)
    resumed = autoencoder(table, 3, **options, epochs=done + 2, checkpoint=path)
    assert same(resumed, autoencoder(table, 3, **options, epochs=done + 2))


def test_short_epochs_are_not_all_checkpoints(table, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(TensorFormat, "save", lambda *args, epoch, **rest: saved.append(epoch))
    autoencoder(table, 3, **QUICK, checkpoint=tmp_path / "c.pt", checkpoint_seconds=1e9)
    assert saved == [3]
    autoencoder(table, 3, **QUICK, checkpoint=tmp_path / "d.pt", checkpoint_seconds=0)
    assert saved == [3, 1, 2, 3]


def test_whole_table_steps_can_be_resumed(table, tmp_path):
    options = QUICK | dict(batch_size=10**6, epochs=9, rmse_weight=0.1)
    half = options | dict(epochs=4)
    autoencoder(table, 3, **half, checkpoint=tmp_path / "c.pt")
    assert same(
        autoencoder(table, 3, **options, checkpoint=tmp_path / "c.pt"), autoencoder(table, 3, **options)
    )


def test_a_finished_checkpoint_returns_at_once_and_can_be_prolonged(table, tmp_path):
    path = tmp_path / "c.pt"
    done = autoencoder(table, 3, **QUICK, checkpoint=path)
    before = os.stat(path).st_mtime_ns
    assert same(autoencoder(table, 3, **QUICK, checkpoint=path), done)
    assert os.stat(path).st_mtime_ns == before
    longer = autoencoder(table, 3, **QUICK | dict(epochs=5), checkpoint=path)
    assert same(longer, autoencoder(table, 3, **QUICK | dict(epochs=5)))
    with pytest.raises(ValueError, match="epochs: expected at least the checkpoint's 5, got 3"):
        autoencoder(table, 3, **QUICK, checkpoint=path)


def test_a_foreign_or_damaged_checkpoint_is_refused(table, tmp_path):
    path = tmp_path / "c.pt"
    autoencoder(table, 3, **QUICK, checkpoint=path)
    for arguments in (
        (table, 4, QUICK),
        (table + 1, 3, QUICK),
        (table.view(60, 20), 3, QUICK),
        (table, 3, QUICK | dict(lr=0.1)),
    ):
        with pytest.raises(ValueError, match="checkpoint: .* belongs to another run"):
            autoencoder(*arguments[:2], **arguments[2], checkpoint=path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="checkpoint: .* is not a readable safetensors file .* delete it"):
        autoencoder(table, 3, **QUICK, checkpoint=path)
    torch.save({"identity": {}, "epoch": 1}, path)  # as checkpoints once were
    with pytest.raises(ValueError, match=f"checkpoint: {path} is of an earlier version of embkern"):
        autoencoder(table, 3, **QUICK, checkpoint=path)


@pytest.mark.parametrize(
    ("name", "value"), [("best_score", math.nan), ("best_score", math.inf), ("step", 2**60), ("epoch", 0)]
)
def test_a_checkpoint_that_no_run_wrote_is_refused(table, tmp_path, name, value):
    path = tmp_path / "c"
    autoencoder(table, 3, **QUICK, checkpoint=path)
    tensors, settings = FORMAT.load(path, lambda *each: each)
    FORMAT.save(path, tensors, **{**settings, name: value})
    with pytest.raises(ValueError, match=f"checkpoint: {path}: .*{name}"):
        autoencoder(table, 3, **QUICK, checkpoint=path)


def test_a_checkpoint_that_is_a_pipe_is_not_waited_for(table, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits for somebody to write"))
    signal.alarm(20)
    try:
        with pytest.raises(ValueError, match="checkpoint: .* found none at .*pipe"):
            autoencoder(table, 3, **QUICK, checkpoint=tmp_path / "pipe")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_flipped_bit_of_a_checkpoint_is_noticed_wherever_it_is(table, tmp_path):
    path, draw = tmp_path / "c", random.Random(0)
    autoencoder(table, 3, **QUICK, checkpoint=path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in [*draw.sample(range(header), 120), *draw.sample(range(header, len(whole)), 60)]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"checkpoint: {path}.*delete it to start anew"):
            autoencoder(table, 3, **QUICK, checkpoint=path)


def test_equal_checkpoints_have_equal_bytes(table, tmp_path, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))  # the history has how long epochs took
    files = set()
    for number in range(4):
        autoencoder(table, 3, **QUICK, checkpoint=tmp_path / str(number))
        files.add((tmp_path / str(number)).read_bytes())
    assert len(files) == 1


def test_the_facts_are_those_of_the_best_epoch(table, tmp_path):
    scores = iter([2.0, 1.0, 3.0])
    log, run = tmp_path / "log", dict(**QUICK, checkpoint=tmp_path / "c")
    done = autoencoder(table, 3, **run, log=log, validate=lambda factors: next(scores))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert done.facts == {name: lines[1][name] for name in ("epoch", "loss", "direction_error", "rmse")}
    log.unlink()
    assert autoencoder(table, 3, **run, log=log).facts == done.facts
    assert [json.loads(line) for line in log.read_text().splitlines()] == lines, "a finished run has a log"


def test_divergence_is_an_error(table):
    with pytest.raises(RuntimeError, match="training diverged, lower lr"):
        autoencoder(table, 3, **QUICK | dict(epochs=20), lr=1e30, mse_weight=1.0)


@pytest.mark.parametrize("shape", [(1, 5), (3, 1), (33, 7)], ids=str)
def test_odd_tables(shape):
    assert autoencoder(torch.randn(shape), 1, **QUICK).to_dense().shape == shape


def test_zero_rows_and_equal_rows():
    table = torch.randn(20, 6)
    table[3:9] = 0
    table[10:15] = 1
    assert torch.isfinite(autoencoder(table, 2, **QUICK, rmse_weight=1.0).to_dense()).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(epochs=0), "autoencoder: epochs: .* greater than or equal to 1, got 0"),
        (dict(lr=-1.0), "lr: .* greater than 0"),
        (dict(batch_size=0), "batch_size"),
        (dict(activation="relu"), "activation: .*got 'relu'"),
        (dict(init="pca"), "init"),
        (dict(epoch=3), "epoch: Extra inputs"),
    ],
)
def test_bad_options_are_named(table, options, message):
    with pytest.raises(ValueError, match=message):
        autoencoder(table, 3, progress=False, **options)


def test_bad_tables_and_ranks_are_named(table):
    with pytest.raises(ValueError, match="rank: expected 1 <= rank <= H = 10, got 11"):
        autoencoder(table, 11)
    table[4] = float("inf")
    with pytest.raises(ValueError, match=r"table: expected finite values, got .* in 1 row\(s\): 4"):
        autoencoder(table, 3)

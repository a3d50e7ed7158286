"""The divergence of a compressed table on inputs that its calibration did not see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from embkern.methods import allocate
from embkern.models.calibrate import calibrate
from embkern.models.calibrate.on_text import calibrate_holding_out
from embkern.models.calibrate.windows import HeldOut, Windows
from embkern.models.find_table import find_table
from embkern.models.held_out import held_out_divergence
from tests.conftest import seed_of
from tests.example_models import MODELS
from tests.models.calibrating import distinct_words, tokenizer

LENGTH, MASK = 12, 3


def build(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def held_out(model, mask=None, count=5) -> HeldOut:
    V = model.get_input_embeddings().num_embeddings
    generator = np.random.default_rng(seed_of(0))
    return HeldOut(Windows([generator.integers(4, V, LENGTH) for _ in range(count)]), mask)


def log_probabilities(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(ids)[None]).logits[0].log_softmax(-1)


@pytest.mark.parametrize(
    ("name", "mask"), [("gpt2", None), ("llama-tied", None), ("gemma3", None), ("bert", MASK)]
)
@pytest.mark.parametrize("head", [True, False])
def test_it_is_the_divergence_of_the_models_outputs(name, mask, head):
    model, other = build(name), build(name)
    table, inputs = find_table(model), held_out(model, mask)
    packed = allocate(table.weight.detach(), ratio=2)
    measured = held_out_divergence(model, table, packed, inputs, head=head)

    decoded = packed.to(table.weight.dtype).to_dense()
    with torch.no_grad():
        if not head:
            other.get_output_embeddings().weight = torch.nn.Parameter(table.weight.clone())
        other.get_input_embeddings().weight.copy_(decoded)
    divergences, agreeing = [], []
    for ids, positions, targets in inputs:
        assert len(positions) == len(targets)
        dense, compressed = (log_probabilities(each, ids)[positions] for each in (model, other))
        divergences.append(F.kl_div(compressed, dense, log_target=True, reduction="none").sum(-1))
        agreeing.append(dense.argmax(-1) == compressed.argmax(-1))
    each = torch.cat(divergences).double()
    assert measured.tokens == len(each) == (5 * (LENGTH - 1) if mask is None else 5 * 2)
    # The terms of a divergence cancel: each is up to as large as a logarithm of a probability, and rounded.
    bound = 64 * torch.finfo(torch.float32).eps * max(1.0, float(dense.abs().max()))
    assert measured.mean == pytest.approx(float(each.mean()), abs=bound, rel=1e-3)
    assert measured.p99 == pytest.approx(float(each.quantile(0.99)), abs=bound, rel=1e-3)
    assert measured.top1 == pytest.approx(float(torch.cat(agreeing).double().mean()), abs=1.01 / len(each))
    assert find_table(model).weight is table.weight  # The model has its own table again.


def test_masked_inputs_hide_what_they_score():
    inputs = held_out(build("bert"), MASK)
    for (ids, positions, targets), own in zip(inputs, inputs.windows.ids, strict=True):
        assert (ids[positions] == MASK).all()
        assert (own[positions] == targets).all()
        assert (np.delete(ids, positions) == np.delete(own, positions)).all()
    first, again = ([each[0].tolist() for each in inputs] for _ in range(2))
    assert first == again


def test_what_is_held_out_is_not_calibrated_on():
    model, words = build("gpt2"), tokenizer()
    texts = [distinct_words()] * 8
    found, unseen = calibrate_holding_out(model, words, texts, 32, tokens=256, length=16)
    windows = unseen.windows.ids
    assert len(windows) == 2
    whole = calibrate(model, words, texts, tokens=256 + 32, length=16)
    assert found.tokens == whole.tokens - sum(map(len, windows))
    read = torch.zeros(len(whole.inputs), dtype=torch.float64)
    for ids in windows:
        read += torch.from_numpy(ids).bincount(minlength=len(read))
    assert torch.equal(found.inputs + read, whole.inputs)


@pytest.mark.parametrize(("count", "tokens", "expected"), [(8, 40, 0), (9, 1, 1), (40, 20, 2), (40, 900, 4)])
def test_at_most_a_ninth_is_held_out(count, tokens, expected):
    whole = Windows([np.full(10, number) for number in range(count)], 1, 1)
    kept, rest = whole.hold_out(tokens)
    out = [] if rest is None else [int(ids[0]) for ids in rest.ids]
    assert len(out) == expected
    assert sorted([*(int(ids[0]) for ids in kept.ids), *out]) == list(range(count))
    assert (kept.first, kept.last) == (1, 1)

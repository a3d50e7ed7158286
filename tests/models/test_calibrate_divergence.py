"""The second-order formula of a calibration compared with exact KL divergences of perturbed tables.

Independent errors of every row, ``e = deviation * A z`` with a standard normal z, have the expected
divergence ``deviation^2 / 2 * trace(A^T G A)`` for the lookups, if no token of a window occurs twice: the
terms between two positions have mean 0. For the head it is the mean over positions of
``deviation^2 / 2 * (1 - sum_i p_i^2) h^T A A^T h``, of which the formula leaves out ``sum_i p_i^2``.
"""

from __future__ import annotations

import math

import pytest

pytest.importorskip("transformers")
import torch
import torch.nn.functional as F

from embkern.models.calibrate import calibrate
from tests.conftest import seed_of
from tests.models.calibrating import H, V, distinct_words, sharp, tokenizer, untied

LENGTH, DRAWS, DEVIATION = 9, 400, 1e-3
TEXT = " ".join(distinct_words().split()[: 10 * LENGTH])


def divergences(model, change, generator):
    """The mean KL divergence per token for each draw of errors, in units of half the squared deviation."""
    ids = torch.tensor(tokenizer()(TEXT)["input_ids"]).view(10, LENGTH)
    matrix = torch.randn(H, H, dtype=torch.float64, generator=generator)
    weights = [each.weight for each in change]
    original = [weight.detach().clone() for weight in weights]
    found = []
    with torch.no_grad():
        before = model(input_ids=ids).logits.log_softmax(-1)
        for _ in range(DRAWS):
            error = DEVIATION * torch.randn(V, H, dtype=torch.float64, generator=generator) @ matrix.t()
            for weight, own in zip(weights, original, strict=True):
                weight.copy_(own - error)
            after = model(input_ids=ids).logits.log_softmax(-1)
            divergence = F.kl_div(after, before, log_target=True, reduction="sum") / ids.numel()
            found.append(float(divergence) * 2 / DEVIATION**2)
    collision = float((before.exp().square().sum(-1)).max())
    return torch.tensor(found, dtype=torch.float64), matrix, collision


def calibrated(model, seeds=60):
    """Calibrations with labels of many seeds."""
    return [
        calibrate(model, tokenizer(), [TEXT], tokens=90, length=LENGTH, seed=seed, progress=False)
        for seed in range(seeds)
    ]


def predicted(calibrations, matrix):
    return torch.stack([(matrix.t() @ (c.input_moment / c.scored) @ matrix).trace() for c in calibrations])


def standard_error(values):
    return float(values.std() / math.sqrt(len(values)))


@pytest.mark.parametrize("name", ["llama-untied", "gemma3"])
def test_errors_of_the_input_cost_what_the_moment_says(name):
    model = sharp(name)
    changed, embeddings = untied(model)
    exact, matrix, _ = divergences(changed, embeddings, torch.Generator().manual_seed(seed_of(1)))
    forms = predicted(calibrated(model), matrix)
    slack = 6 * math.hypot(standard_error(exact), standard_error(forms))
    assert slack < 0.25 * float(exact.mean()), "the comparison says something"
    assert abs(float(exact.mean() - forms.mean())) < slack + DEVIATION * float(exact.mean())


@pytest.mark.parametrize("name", ["llama-untied", "gemma2", "granite"])
def test_errors_of_the_head_cost_what_the_moment_says(name):
    model = sharp(name, 4.0)
    changed, _ = untied(model)
    exact, matrix, collision = divergences(
        changed, [changed.get_output_embeddings()], torch.Generator().manual_seed(seed_of(1))
    )
    found = calibrate(model, tokenizer(), [TEXT], tokens=90, length=LENGTH, progress=False)
    form = float((matrix.t() @ (found.head_moment / found.scored) @ matrix).trace())
    slack = 6 * standard_error(exact)
    assert slack < 0.1 * form
    assert (1 - collision) * form - slack < float(exact.mean()) < form + slack + DEVIATION * form

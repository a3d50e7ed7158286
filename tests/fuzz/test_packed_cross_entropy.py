"""``packed_cross_entropy`` on random packed tables: losses and gradients within rounding in every backend."""

from __future__ import annotations

from random import Random

import torch
import torch.nn.functional as F

from embkern.ops import gather_decode, packed_cross_entropy
from tests.fuzz import Case, fuzz
from tests.fuzz.ops import backends_of, needs_extension
from tests.fuzz.tensors import Unchanged, assert_within, dtype_of, generator_of, make, same_bits
from tests.fuzz.test_gather_decode import packed
from tests.fuzz.test_packed_logits import packed_logits_case

pytestmark = needs_extension


def packed_cross_entropy_case(random: Random) -> Case:
    case = packed_logits_case(random)
    case["spread"] = random.choice((1e-3, 0.1, 1.0))
    case["ignored"] = random.choice((0.0, 0.3, 1.0))
    case["softcap"] = random.choice((None, 1.0, 30.0))
    case["smoothing"] = random.choice((0.0, 0.0, 0.1, 1.0))
    case["bias"] = random.random() < 0.5
    case["labels"] = random.choice(("int32", "int64"))
    return case


@fuzz(packed_cross_entropy_case)
def test_packed_cross_entropy(case):
    tensors, generator = packed(case)
    V, H, N, dtype = case["V"], case["H"], case["states"], dtype_of(case["hidden"])
    hidden = make((N, H), dtype, generator, "normal", case["layouts"]["hidden"]) * case["spread"]
    labels = torch.randint(V, (N,), generator=generator_of(1)).to(dtype_of(case["labels"]))
    labels[torch.rand(N, generator=generator_of(2)) < case["ignored"]] = -100
    bias = torch.randn(V, generator=generator_of(3)) if case["bias"] else None
    options = dict(label_smoothing=case["smoothing"], softcap=case["softcap"], bias=bias, reduction="none")
    wide = {
        name: each.double() if each is not None and each.is_floating_point() else each
        for name, each in tensors.items()
    }
    rows = gather_decode(torch.arange(V), **wide, embedding_dim=H, backend="torch")
    sizes = rows.abs() + wide["scales"].abs().unsqueeze(1) * (
        0 if wide["basis"] is None else 128 * wide["basis"].abs().sum(0)
    )
    if wide["offset"] is not None:
        sizes = sizes + 2 * wide["offset"].abs()
    leaf = hidden.double().requires_grad_()
    logits = leaf @ rows.t() + (0 if bias is None else bias.double())
    if case["softcap"]:
        logits = case["softcap"] * torch.tanh(logits / case["softcap"])
    exact = F.cross_entropy(logits, labels.long(), label_smoothing=case["smoothing"], reduction="none")
    exact.sum().backward()
    # The torch backend rounds rows to their dtype and to that of hidden.
    unit = max(torch.finfo(each).eps for each in (dtype, tensors["scales"].dtype))
    native_unit = torch.finfo(torch.float32).eps * (H + case["K"] + 8)
    size = (hidden.double().abs() @ sizes.t()).amax(1) if N else torch.zeros(0).double()
    for backend in backends_of(case):
        relative = native_unit + unit * (4 if backend != "native" else 0)
        wrong = relative * (size + 8)  # of a logit, capped or not
        # Probabilities change by the factor exp(2 * wrong), and each of the V summands of a state is rounded.
        of_loss = 2 * wrong + 1e-6 * (1 + exact.detach().abs() + size)
        p = torch.softmax(logits.detach(), 1) + F.one_hot(labels.long().clamp_min(0), V) + 1 / V
        of_grad = (torch.expm1((2 * wrong).clamp_max(60)) + relative + 2e-5).unsqueeze(1) * (p @ sizes)
        with Unchanged(hidden, labels, bias, *tensors.values()):
            got = packed_cross_entropy(hidden, labels, **tensors, backend=backend, **options)
            assert got.shape == (N,)
            assert_within(got, exact.detach(), of_loss, of_loss * 4 + 1, f"{backend} losses", True)
            assert same_bits(got, packed_cross_entropy(hidden, labels, **tensors, backend=backend, **options))
            ours = hidden.detach().requires_grad_()
            losses = packed_cross_entropy(ours, labels, **tensors, backend=backend, **options)
            assert same_bits(got, losses.detach())
            losses.sum().backward()
            within = of_grad + torch.finfo(dtype).eps * leaf.grad.abs() + torch.finfo(dtype).tiny
            assert_within(ours.grad, leaf.grad, within, within * 4 + 1, f"{backend} gradient", True)
            assert not ours.grad[labels == -100].any()

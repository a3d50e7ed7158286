"""``packed_logits`` on random packed tables: errors within rounding in every backend."""

from __future__ import annotations

from random import Random

import torch

from embkern.ops import gather_decode, packed_logits
from tests.fuzz import Case, fuzz
from tests.fuzz.ops import backends_of, needs_extension
from tests.fuzz.tensors import FLOATS, Unchanged, assert_within, dtype_of, make, same_bits
from tests.fuzz.test_gather_decode import gather_decode_case, packed

pytestmark = needs_extension


def packed_logits_case(random: Random) -> Case:
    case = gather_decode_case(random)
    # Values of ordinary size: gather_decode's property covers those that overflow or flush.
    case["values"] = dict.fromkeys(case["values"], "normal")
    case["layouts"] = {**case["layouts"], "hidden": random.choice(tuple(case["layouts"].values()))}
    case["states"] = random.choice((0, 1, 2, 7, 8, 9, 33, random.randint(1, 300)))
    case["hidden"] = random.choice(FLOATS)
    return case


@fuzz(packed_logits_case)
def test_packed_logits(case):
    tensors, generator = packed(case)
    V, H, N, dtype = case["V"], case["H"], case["states"], dtype_of(case["hidden"])
    hidden = make((N, H), dtype, generator, "normal", case["layouts"]["hidden"])
    wide = {
        name: each.double() if each is not None and each.is_floating_point() else each
        for name, each in tensors.items()
    }
    ids = torch.arange(V)
    rows = gather_decode(ids, **wide, embedding_dim=H, backend="torch")
    sizes = rows.abs()
    if wide["basis"] is not None:  # The products with the basis may cancel.
        sizes = gather_decode(
            ids, **{**wide, "scales": wide["scales"].abs()}, embedding_dim=H, backend="torch"
        ).abs() + wide["scales"].abs().unsqueeze(1) * 128 * wide["basis"].abs().sum(0)
    if wide["offset"] is not None:
        sizes = sizes + 2 * wide["offset"].abs()
    exact, size = hidden.double() @ rows.t(), hidden.double().abs() @ sizes.t()
    # The torch backend rounds rows to their dtype and to that of hidden, and sums in the latter.
    unit = max(torch.finfo(each).eps for each in (dtype, tensors["scales"].dtype))
    native_unit = torch.finfo(torch.float32).eps * (H + case["K"] + 8)
    for backend in backends_of(case):
        within = (
            torch.finfo(dtype).eps * exact.abs()
            + (native_unit + unit * (4 if backend != "native" else 0)) * size
        )
        most = size * 256 + 1
        with Unchanged(hidden, *tensors.values()):
            got = packed_logits(hidden, **tensors, backend=backend)
            assert got.shape == (N, V)
            assert got.dtype == dtype
            assert_within(got, exact, within + 1e-6, most, f"{backend} logits", True)
            assert same_bits(got, packed_logits(hidden, **tensors, backend=backend))
            leaf = hidden.detach().requires_grad_()
            assert same_bits(got, packed_logits(leaf, **tensors, backend=backend).detach())

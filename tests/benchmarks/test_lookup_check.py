"""The check of the lookup: every provider passes it, and wrong results do not."""

import pytest
import torch

from benchmarks.lookup_check import Check, _rows_of
from benchmarks.peers import FORWARD, MODES, PROVIDERS, Lookup, Problem
from benchmarks.shapes import MODELS, id_sets
from tests.conftest import seed_of

pytestmark = pytest.mark.slow


TINY = MODELS["tiny"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in PROVIDERS if name != "two-step-compiled"])
def test_every_provider_is_right(name, dtype):
    provider = PROVIDERS[name]
    if reason := provider.reason("cpu", dtype):
        pytest.skip(reason)
    problem = Problem(TINY, TINY.ranks[0], dtype, "cpu")
    lookup = provider.build(problem)
    (ids,) = id_sets("zipf", TINY.V, 300, sets=1)
    assert len(ids.unique()) < 300, "repeated ids are part of the check"
    for mode in provider.modes:
        with torch.set_grad_enabled(mode != FORWARD):
            Check(problem, ids, mode)(lookup)


@pytest.mark.parametrize("mode", MODES)
def test_the_check_of_one_token_compares_enough_values(mode):
    """Two kernels as good as each other differ by more than 2 in one row of 24 values now and then."""
    for seed in range(40):
        problem = Problem(TINY, TINY.ranks[0], torch.float32, "cpu", seed_of(seed))
        check = Check(problem, torch.tensor([17 * seed % TINY.V]), mode)
        for first, second in (("two-step", "embkern"), ("embkern", "two-step")):
            errors, plain = (check._errors(PROVIDERS[name].build(problem)) for name in (first, second))
            assert all(error <= 2 * each + 1e-7 for error, each in zip(errors, plain, strict=True))


def test_the_check_refuses_what_is_wrong():
    problem = Problem(TINY, TINY.ranks[0], torch.float32, "cpu")
    (ids,) = id_sets("uniform", TINY.V, 50, sets=1)
    right = PROVIDERS["two-step"].build(problem)

    def off(factor):
        return Lookup(lambda ids: right.call(ids) * factor, right.nbytes, right.leaves)

    for mode in MODES:
        Check(problem, ids, mode)(off(1.0))
        with pytest.raises(AssertionError, match="relative error"):
            Check(problem, ids, mode)(off(1.0001))
    stray = torch.zeros(TINY.V, 2)
    stray[7] = 1
    for grad in (stray, stray.to_sparse(1)):
        with pytest.raises(AssertionError, match="no id names"):
            _rows_of(grad, torch.tensor([6, 8]))

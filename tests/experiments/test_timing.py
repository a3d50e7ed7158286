"""Paired timing: one sample of every provider per round, and ratios within a round."""

import time

from embkern.experiments import timing


def test_speedups_pair_the_rounds():
    """A machine that is half as fast in every second round changes no ratio within a round."""
    slow = [1.0, 2.0, 1.0, 2.0, 1.0]
    times = {
        "two-step": [30 * each for each in slow],
        "two-step-compiled": [40 * each for each in slow],
        "embkern": [10 * each for each in slow],
    }
    got = timing.speedups(times, "embkern", ("two-step", "two-step-compiled"))
    assert got == {"baseline": "two-step", "speedup": 3.0, "speedup_of_medians": 3.0}
    assert timing.speedups({"embkern": slow}, "embkern", ("two-step",))["speedup"] is None


def test_paired_rounds_take_one_sample_of_each_per_round():
    taken = []
    samples = {name: lambda name=name: taken.append(name) or 1.0 for name in "abc"}
    times = timing.paired_rounds(samples, seconds=0, repeats=(4, 100))
    assert {name: len(each) for name, each in times.items()} == dict.fromkeys("abc", 4)
    assert all(sorted(taken[k : k + 3]) == ["a", "b", "c"] for k in range(0, 12, 3))


def test_a_sample_goes_through_the_batches_in_turn():
    seen = []
    sample, timer = timing.cpu_sampler([lambda k=k: seen.append(k) or time.sleep(3e-4) for k in range(3)])
    assert timer == "perf_counter"
    seen.clear()
    for _ in range(6):
        assert sample() >= 300
    assert sorted(seen) == [0, 0, 1, 1, 2, 2]

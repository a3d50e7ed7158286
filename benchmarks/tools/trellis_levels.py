"""Finds the levels of the trellises of packed tables, embkern/data/trellis_levels.txt, and their error.

Lloyd's iteration, as for a memoryless quantiser: samples of a standard normal variable are coded by the best
path, then every level becomes the mean of the samples coded with it. The local optimum depends on the initial
order of the levels among the states, so the best of several random orders is kept. The squared error on
independent samples is printed beside that of Lloyd-Max levels at the same bits, and the lower bound of any
code of that rate, 4^-bits.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from embkern.methods.quantizer_levels import distortion
from embkern.ops.packed_format import GROUP, LEVEL_BITS, LEVEL_STEP, STATES, TRELLIS_FILE, trellis_states
from embkern.ops.quantize_trellis import quantize_trellis

SAMPLES = (1000, 512)
HEADER = """# Levels of the trellises of packed tables, in steps of 2^-12, for a standard normal variable:
# codes of 1 bit by their 128 states, then 2, 3 and 4. Found by `python -m benchmarks trellis_levels`.
"""


def main(arguments: list[str]) -> None:
    """Find levels of 1 to 4 bits, print their errors, write the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks trellis_levels", description=__doc__)
    parser.add_argument("--orders", type=int, default=12, help="random orders to begin with")
    parser.add_argument("--steps", type=int, default=40, help="of Lloyd's iteration")
    parser.add_argument("--output", type=Path, default=TRELLIS_FILE)
    options = parser.parse_args(arguments)
    found = []
    for bits in range(1, LEVEL_BITS + 1):
        tried = [_levels(bits, seed, options.steps) for seed in range(options.orders)]
        errors = [_error(levels, bits) for levels in tried]
        best = min(range(len(tried)), key=errors.__getitem__)
        found.append(tried[best])
        rivals = {"trellis": errors[best], "Lloyd-Max": distortion(bits), "bound": 4.0**-bits}
        shown = ", ".join(f"{name} {-10 * math.log10(error):.2f} dB" for name, error in rivals.items())
        print(f"{bits} bits: error {errors[best]:.5f}, worst order {max(errors):.5f}; {shown}", flush=True)
    lines = [" ".join(map(str, part)) for levels in found for part in levels.view(-1, 16).tolist()]
    options.output.write_text(HEADER + "\n".join(lines) + "\n")
    print("->", options.output)


def _levels(bits: int, seed: int, steps: int) -> Tensor:
    """Return levels (128,) int16, found from a random initial order."""
    generator = torch.Generator().manual_seed(seed)
    quantiles = (torch.arange(STATES, dtype=torch.float64) + 0.5) / STATES
    values = torch.special.ndtri(quantiles).float() * math.sqrt(1 - 4.0**-bits)
    values = values[torch.randperm(STATES, generator=generator)]
    for _ in range(steps):
        samples = torch.randn(SAMPLES, generator=generator)
        states = _states(samples, _rounded(values), bits).flatten()
        sums = torch.zeros(STATES).index_add_(0, states, samples.flatten())
        counts = states.bincount(minlength=STATES)
        values = torch.where(counts > 0, sums / counts.clamp_min(1), values)
    return _rounded(values)


def _rounded(values: Tensor) -> Tensor:
    return (values / LEVEL_STEP).round().to(torch.int16)


def _states(samples: Tensor, levels: Tensor, bits: int) -> Tensor:
    groups = samples.shape[1] // GROUP
    codes, _, _ = quantize_trellis(
        samples,
        None,
        torch.full((groups,), bits, dtype=torch.uint8),
        levels.expand(LEVEL_BITS, -1),
        torch.ones(len(samples), 1),
        needs_codes=True,
    )
    return trellis_states(codes.long().view(-1, groups, GROUP), bits).flatten(1)


def _error(levels: Tensor, bits: int) -> float:
    samples = torch.randn(4 * SAMPLES[0], SAMPLES[1], generator=torch.Generator().manual_seed(2**31))
    decoded = levels.float()[_states(samples, levels, bits)] * LEVEL_STEP
    return float((samples - decoded).square().double().mean())
